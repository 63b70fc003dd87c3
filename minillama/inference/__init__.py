"""From logits to tokens, from tokens to text; quantization of the weights that decode."""
