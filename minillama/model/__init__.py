"""Decoder, weight initialization, linear layers by name."""

from minillama.model.decoder import Block, Decoder

__all__ = ["Block", "Decoder"]
