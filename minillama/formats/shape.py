"""Model configuration from any format. torch is loaded for those alone whose header is not text."""

from __future__ import annotations

import os
from pathlib import Path

from minillama.config import ModelConfig
from minillama.config.loader import config_names, nearest_path
from minillama.errors import InputError
from minillama.files import model_folder, refuse_remote


def model_config(source: str | os.PathLike[str], where: str = "") -> ModelConfig:
    """Model configuration of a preset, a TOML file, or a model of any format.

    Args:
        source: its name or path.
        where: the setting that asks for a model's weights, and not for a preset.

    Raises:
        InputError: as `ModelConfig.load` and `open_model` raise.
    """
    if where:
        _check_path(Path(source), where)
    path = model_folder(Path(source))
    is_text = (path / "config.json").exists() or path.suffix in (".toml", ".json") or not path.exists()
    if is_text:
        return ModelConfig.load(source if path == Path(source) else path)
    from minillama.formats.open import open_model

    return open_model(path).config


def _check_path(path: Path, where: str) -> None:
    """Refuse a model that is not there, with the nearest path that is."""
    refuse_remote(path)
    if not path.exists():
        made = path.parent.name if path.parent.name in config_names("train") else ""
        command = f"minillama train {made}".removesuffix(" tiny")
        known = f"{command} makes it" if made else "name another model"
        fix = nearest_path(path) or known
        expected = "a run, a Hugging Face or Meta folder, a GGUF file or a llama2.c .bin"
        raise InputError("no such model", where=where, found=path, expected=expected, fix=fix)
