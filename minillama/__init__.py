"""The whole LLaMA recipe in one small package; a name is imported when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minillama.config import ModelConfig
    from minillama.errors import InputError
    from minillama.inference.generate import generate, stream
    from minillama.model import Decoder
    from minillama.tokenizer import Tokenizer

__version__ = "0.1.0"
__all__ = ["Decoder", "InputError", "ModelConfig", "Tokenizer", "__version__", "generate", "stream"]

_HOME = {
    "Decoder": "model",
    "InputError": "errors",
    "ModelConfig": "config",
    "Tokenizer": "tokenizer",
    "generate": "inference.generate",
    "stream": "inference.generate",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
