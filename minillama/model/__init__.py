"""Decoder, weight initialization, linear layers by name."""

from minillama.model.block import Block
from minillama.model.decoder import Decoder

__all__ = ["Block", "Decoder"]
