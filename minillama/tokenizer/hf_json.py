"""tokenizer.json of the `tokenizers` library, with the tokenizer_config.json beside it."""

from __future__ import annotations

import json
from base64 import b64decode
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from minillama.errors import InputError
from minillama.files import read_json, read_text
from minillama.formats.generation_config import stop_ids
from minillama.tokenizer import sentencepiece
from minillama.tokenizer.charsmap import charsmaps
from minillama.tokenizer.charsmap import check as check_charsmap
from minillama.tokenizer.spec import FIX, LARGEST, Parts, library

END_OF_TEXT = "<|endoftext|>"
SETTINGS, _ADDITIONAL = "tokenizer_config.json", "additional_chat_templates"
ENCODE_WITH = "encode_with"  # of tokenizer_config.json: tokenizer.model, where tokenizer.json is not exact
# Defaults where no file names them.
_EOS_NAMES = (END_OF_TEXT, "</s>", "<|end_of_text|>")
_BOS_NAMES = (END_OF_TEXT, "<s>", "<|begin_of_text|>")


def read(file: Path) -> Parts:
    """Read the file, with tokenizer_config.json and chat_template.jinja if they exist.

    Raises:
        InputError: no such file, or it is not a tokenizer.json, or it names no end-of-text token.
    """
    backend = _backend(file)
    settings_file = file.with_name(SETTINGS)
    settings = _settings(file.parent)
    _add(backend, settings.get("added_tokens_decoder"), settings_file)
    added = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
    ends = (i for i in sorted(stop_ids(file.parent)) if 0 <= i < 2**32)
    names = (*(added.get(i) or backend.id_to_token(i) or "" for i in ends), *_EOS_NAMES)
    eos = _token(settings.get("eos_token"), backend, names)
    bos = _token(settings.get("bos_token"), backend, () if settings_file.exists() else _BOS_NAMES)
    if eos is None:
        raise InputError(
            "the tokenizer names no end-of-text token",
            where=f"{settings_file}, eos_token",
            expected=f"eos_token, or one of {', '.join(_EOS_NAMES)} in the vocabulary",
            fix=f'write {{"eos_token": "..."}} to {settings_file}',
        )
    for token in (eos, bos or eos):
        if backend.token_to_id(token) is None:
            expected = "a token of tokenizer.json"
            raise InputError("this token is not in the vocabulary", where=settings_file, found=token, expected=expected)
    # Default: the file's own post-processor, as its models were trained.
    starts = backend.encode("").ids[:1] == [backend.token_to_id(bos or eos)]
    add_bos = bool(settings.get("add_bos_token", starts)) and (bos is not None or starts)
    parts = Parts(backend, eos, bos, add_bos, settings)
    if settings.get(ENCODE_WITH) is None:
        return parts
    model = file.with_name("tokenizer.model")
    if settings[ENCODE_WITH] != model.name or not model.is_file():
        what, found = "the SentencePiece model that this tokenizer encodes with is not there", settings[ENCODE_WITH]
        raise InputError(what, where=f"{settings_file}, {ENCODE_WITH}", found=found, expected=model.name)
    exact = sentencepiece.read(model)
    return replace(parts, model=exact.model, encoder=exact.encoder)


def _backend(file: Path) -> Backend:
    spec, what = read_json(file, FIX, LARGEST), "this is not a tokenizer.json of the tokenizers library"
    if not isinstance(spec.get("model"), dict):  # as Mistral's tekken files, which have ranks
        raise InputError(what, where=file, found=f"keys {', '.join(spec)[:100]}", expected="a model", fix=FIX)
    with library(file, what):
        for data in charsmaps(spec.get("normalizer")):
            check_charsmap(b64decode(str(data), validate=True), file)
        backend = Backend.from_str(json.dumps(spec))
        backend.encode("a")  # some damage fails only in use
    return backend


def _add(backend: Backend, table: object, where: Path) -> None:
    """Add the tokens of tokenizer_config.json's added_tokens_decoder that tokenizer.json lacks."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    rows = table.items() if isinstance(table, dict) else ()
    for index, row in sorted(rows, key=lambda item: (len(item[0]), item[0])):
        name = row.get("content") if isinstance(row, dict) else None
        if not isinstance(name, str) or not name or name in known:
            continue
        flags = {key: row.get(key) is True for key in ("lstrip", "rstrip", "normalized", "single_word", "special")}
        token = AddedToken(name, **flags)
        (backend.add_special_tokens if flags["special"] else backend.add_tokens)([token])
        if str(backend.token_to_id(name)) != index:
            what, found = "an added token has another id than in tokenizer.json", f"{name}, {index}"
            where_, expected = f"{where}, added_tokens_decoder", backend.token_to_id(name)
            raise InputError(what, where=where_, found=found, expected=expected)


def _token(value: object, backend: Backend, defaults: Iterable[str]) -> str | None:
    """A token of tokenizer_config.json, a string or an object with its `content`; or the first known default."""
    value = value.get("content") if isinstance(value, dict) else value
    known = (name for name in defaults if backend.token_to_id(name) is not None)
    return value if isinstance(value, str) and value else next(known, None)


def with_settings(parts: Parts, folder: Path) -> Parts:
    """Parts of a vocabulary of another format with the tokenizer_config.json and the chat templates beside it."""
    settings = _settings(folder)
    names = {key: _token(settings.get(f"{key}_token"), parts.backend, ()) for key in ("eos", "bos")}
    known = {key: name for key, name in names.items() if name and parts.backend.token_to_id(name) is not None}
    add_bos = bool(settings.get("add_bos_token", parts.add_bos))
    eos, bos = known.get("eos", parts.eos), known.get("bos", parts.bos)
    return replace(parts, eos=eos, bos=bos, add_bos=add_bos, config={**parts.config, **settings})


def _settings(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json of a folder, its chat templates by name, or the only one if it is the default."""
    file, default = folder / SETTINGS, folder / "chat_template.jinja"
    settings = read_json(file) if file.exists() else {}
    names = folder / "special_tokens_map.json"
    if names.exists():
        settings = {**read_json(names), **{key: value for key, value in settings.items() if value is not None}}
    templates = dict(_named(settings.pop("chat_template", None)))
    if default.exists():
        templates["default"] = read_text(default)
    templates |= {path.stem: read_text(path) for path in sorted((folder / _ADDITIONAL).glob("*.jinja"))}
    if templates:
        settings["chat_template"] = templates["default"] if templates.keys() == {"default"} else templates
    return settings


def _named(value: object) -> Iterator[tuple[str, str]]:
    """Chat templates of tokenizer_config.json: one, a table, or a list of names and templates."""
    if isinstance(value, str):
        value = {"default": value}
    elif isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    for name, template in value.items() if isinstance(value, dict) else ():
        if isinstance(name, str) and isinstance(template, str):
            yield name, template
