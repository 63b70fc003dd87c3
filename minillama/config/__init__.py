"""The shape of a model, its parameters and what they cost, and the strict loader of settings; no torch."""

from minillama.config.model import ModelConfig, RopeScaling

__all__ = ["ModelConfig", "RopeScaling"]
