"""The decoder, its initial weights, its linear layers by name."""

from minillama.model.decoder import Block, Decoder

__all__ = ["Block", "Decoder"]
