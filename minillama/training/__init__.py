"""Pretraining: configuration, objectives, optimizer, loop, checkpoints."""
