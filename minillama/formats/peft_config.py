"""PEFT's adapter_config.json: LoRA settings, and the layers that they choose.

huggingface/peft 0.21.2, tuners/lora/config.py, tuners/tuners_utils.py (check_target_module_exists), utils/other.py
(get_pattern_key). Names of layers are transformers'.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import regex

from minillama.config.lora import ALL_LINEAR, named
from minillama.errors import InputError
from minillama.files import read_json

CONFIG = "adapter_config.json"
VERSION = "0.21.2"  # whose format is read and written
SECONDS = 1.0  # for a regular expression and a name
WITHOUT_EFFECT = {"auto_mapping", "revision", "inference_mode", "peft_version", "runtime_config"}
# the values of further keys that are supported; of all others the empty ones
SUPPORTED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "task_type": ("CAUSAL_LM", "SEQ_CLS", None),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),  # the others change the base
    "megatron_core": ("megatron.core", None),
    "qalora_group_size": (16, None),
}
EMPTY: tuple[object, ...] = (None, False, [], {})


def adapter_error(folder: Path) -> InputError:
    """Error of an adapter that is opened as a model."""
    fix = f"give its base as the model, and this folder with --adapter (convert: --merge) {folder}"
    return InputError("this is an adapter, not a model", where=folder, fix=fix)


@dataclass(frozen=True)
class PeftConfig:
    """Settings of an adapter folder.

    Attributes:
        r: rank, where no pattern gives another.
        lora_alpha: alpha, where no pattern gives another.
        target_modules: layers with a low-rank update: names or their ends; a regular expression; or all-linear.
        exclude_modules: names or their ends, or a regular expression, of layers that are no targets.
        modules_to_save: names or their ends of layers that are stored whole.
        rank_pattern: regular expression of a name or its end -> rank.
        alpha_pattern: the same -> alpha.
        base_model_name_or_path: the base model, as it is called there.
        where: the file, for messages.
    """

    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool
    use_dora: bool
    target_modules: str | list[str]
    exclude_modules: str | list[str]
    modules_to_save: list[str]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    base_model_name_or_path: str
    where: Path

    def targets(self, name: str, is_block: bool) -> bool:
        """Whether a layer, of a block or an embedding or head, has a low-rank update."""
        if self._among("exclude_modules", name):
            return False
        return is_block if self.target_modules == ALL_LINEAR else self._among("target_modules", name)

    def rank(self, name: str) -> int:
        """Rank of a layer."""
        return int(self._pattern("rank_pattern", name, self.r))

    def alpha(self, name: str) -> float:
        """Alpha of a layer."""
        return float(self._pattern("alpha_pattern", name, self.lora_alpha))

    def _among(self, key: str, name: str) -> bool:
        patterns = getattr(self, key)
        if isinstance(patterns, str):
            return bool(patterns) and self._fullmatch(patterns, name, key)
        return any(named(pattern, [name]) for pattern in patterns)

    def _pattern(self, key: str, name: str, default: float) -> float:
        for pattern, value in getattr(self, key).items():
            if self._fullmatch(rf"(.*\.)?({pattern})", name, key):
                return value
        return default

    def _fullmatch(self, pattern: str, name: str, key: str) -> bool:
        try:
            return regex.fullmatch(pattern, name, timeout=SECONDS) is not None
        except (regex.error, TimeoutError) as error:
            what, where = "not a usable regular expression", f"{self.where}, {key}"
            raise InputError(what, where=where, found=pattern[:200], expected=error or "one that is fast") from None


def read_config(path: Path) -> PeftConfig:
    """Read adapter_config.json.

    Raises:
        InputError: not a JSON object; a setting of another type, or one that is not supported, by its name.
    """
    if not os.path.lexists(path):
        raise InputError("no adapter in this folder", where=path.parent, expected=CONFIG)
    values = read_json(path)
    for key, value in values.items():
        if key in _FIELDS or key in WITHOUT_EFFECT:
            continue
        allowed = SUPPORTED.get(key, EMPTY)
        if not any(type(value) is type(item) and value == item for item in allowed):
            what, expected = "this setting of an adapter is not supported", " or ".join(map(json.dumps, allowed))
            raise InputError(what, where=f"{path}, {key}", found=json.dumps(value)[:200], expected=expected)
    if "peft_type" not in values:
        raise InputError("the kind of adapter is missing", where=f"{path}, peft_type", expected="LORA")
    return PeftConfig(where=path, **{key: _field(values, key, path) for key in _FIELDS})


def _field(values: Mapping[str, Any], key: str, path: Path) -> Any:
    default, is_valid, expected = _FIELDS[key]
    value = values.get(key)
    if value is None and default is not None:
        return default
    if not is_valid(value):
        raise InputError(
            "not a value of this setting", where=f"{path}, {key}", found=str(value)[:200], expected=expected
        )
    return value


def _is_rank(value: object) -> bool:
    return type(value) is int and value > 0


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]


def _is_names(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _is_selection(value: object) -> bool:
    return isinstance(value, str) or _is_names(value)


def _is_table(is_valid: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_valid, value.values()))


# key -> default where it is missing or null (None: it may not be), check, what is expected
_FIELDS: dict[str, tuple[Any, Callable[[object], bool], str]] = {
    "r": (8, _is_rank, "a whole number above 0"),
    "lora_alpha": (8, _is_number, "a number"),
    "lora_dropout": (0.0, lambda value: _is_number(value) and 0 <= value < 1, "a number from 0 to 1"),  # type: ignore[operator]
    "use_rslora": (False, lambda value: isinstance(value, bool), "true or false"),
    "use_dora": (False, lambda value: isinstance(value, bool), "true or false"),
    "target_modules": (None, _is_selection, "a list of names, a regular expression or all-linear"),
    "exclude_modules": ("", _is_selection, "a list of names or a regular expression"),
    "modules_to_save": ([], _is_names, "a list of names"),
    "rank_pattern": ({}, _is_table(_is_rank), "a table of whole numbers above 0"),
    "alpha_pattern": ({}, _is_table(_is_number), "a table of numbers"),
    "base_model_name_or_path": ("", lambda value: isinstance(value, str), "a string"),
}
