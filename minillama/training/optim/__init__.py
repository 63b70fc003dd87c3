"""Parameter groups, optimizers, learning-rate schedule."""
