"""Model configuration from any format. torch is loaded for those alone whose header is not text."""

from __future__ import annotations

import os
from pathlib import Path

from minillama.config import ModelConfig
from minillama.files import model_folder


def model_config(source: str | os.PathLike[str]) -> ModelConfig:
    """Model configuration of a preset, a TOML file, or a model of any format.

    Raises:
        InputError: as `ModelConfig.load` and `open_model` raise.
    """
    path = model_folder(Path(source))
    is_text = (path / "config.json").exists() or path.suffix in (".toml", ".json") or not path.exists()
    if is_text:
        return ModelConfig.load(source if path == Path(source) else path)
    from minillama.formats.open import open_model

    return open_model(path).config
