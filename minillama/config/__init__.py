"""Model configuration, parameter shapes, FLOPs and memory, and the strict configuration loader; no torch."""

from minillama.config.model import ModelConfig
from minillama.config.shape import RopeScaling

__all__ = ["ModelConfig", "RopeScaling"]
