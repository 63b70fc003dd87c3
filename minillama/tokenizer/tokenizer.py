"""Tokenizer: text to token ids and back, over the Rust `tokenizers` library and its tokenizer.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from hashlib import sha256
from os import PathLike, fspath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers.processors import TemplateProcessing

from minillama.config.arguments import checked
from minillama.errors import InputError
from minillama.files import replace_file, replace_text
from minillama.tokenizer import open as reader
from minillama.tokenizer import sentencepiece
from minillama.tokenizer.chat import ChatTemplate
from minillama.tokenizer.hf_json import ENCODE_WITH, END_OF_TEXT
from minillama.tokenizer.pre import PRE, pattern_of
from minillama.tokenizer.sentencepiece_vocab import ModelKind, Pieces
from minillama.tokenizer.spec import Parts, check_unicode, encode_texts, to_dict
from minillama.tokenizer.special import SpecialEncoder
from minillama.tokenizer.stream import StreamDecoder, added_words

# Members kept of a loaded tokenizer_config.json, besides those that save() writes itself.
_CARRIED = ("unk_token", "pad_token", "chat_template", "model_max_length")


class Tokenizer:
    """A vocabulary and its segmentation rules.

    Args:
        backend: the `tokenizers.Tokenizer`; it belongs to this object from here on.
        eos: the end-of-text token; it must be in the vocabulary.
        bos: the beginning-of-text token; `eos` where the vocabulary has none of its own, as GPT-2's.
        add_bos: whether generation starts with `bos`, because the model was trained so.
        config: further members of tokenizer_config.json to keep, such as `chat_template`.
        model: the SentencePiece file that the backend was made from; `save` writes it, too.
        encoder: the file's SentencePieceProcessor, which encodes where the backend only approximates it.
        stops: further tokens that end a turn, by the file's format; unknown ones are left out.

    Raises:
        InputError: `eos` or `bos` is not in the vocabulary.
    """

    @checked
    def __init__(
        self,
        backend: Backend,
        *,
        eos: str = END_OF_TEXT,
        bos: str | None = None,
        add_bos: bool = True,
        config: Mapping[str, Any] | None = None,
        model: bytes = b"",
        encoder: Any = None,
        stops: Sequence[str] = (),
    ) -> None:
        backend.no_truncation()  # files in the wild set truncation at 512 and padding, which would pass unnoticed
        backend.no_padding()
        backend.encode_special_tokens = True  # "<|endoftext|>" in a text is its 13 characters
        self.backend = backend
        self.eos_token, self.bos_token = eos, bos or eos
        self.eos_id, self.bos_id = self._id(self.eos_token), self._id(self.bos_token)
        self.add_bos, self._bos, self._stops = add_bos, bos, tuple(stops)
        self._model, self._encoder = model, encoder
        self._config = {key: value for key, value in (config or {}).items() if key in _CARRIED and value is not None}

    @property
    def add_bos(self) -> bool:
        """Whether generation starts with `bos_id`: the post-processor of tokenizer.json."""
        return bool(self.backend.encode("").ids[:1] == [self.bos_id])

    @add_bos.setter
    def add_bos(self, value: bool) -> None:
        if value == self.add_bos:
            return
        bos, id_ = self.bos_token, self.bos_id
        template = TemplateProcessing(single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, id_)])
        self.backend.post_processor = template if value else None

    @property
    def has_bos(self) -> bool:
        """Whether there is a beginning-of-text token: one of its own, or `eos` in its place."""
        return self._bos is not None or self.add_bos

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end a text or a turn, as the vocabulary's file says."""
        return frozenset([self.eos_id, *(i for i in map(self.backend.token_to_id, self._stops) if i is not None)])

    def _id(self, token: str) -> int:
        index = self.backend.token_to_id(token)
        if index is None:
            raise InputError("this token is not in the vocabulary", found=token, expected="a token of tokenizer.json")
        return index

    @classmethod
    @checked
    def load(cls, path: str | PathLike[str]) -> Tokenizer:
        """Read a vocabulary file, or the one in a folder.

        A tokenizer.json (with the tokenizer_config.json and chat_template.jinja beside it), a SentencePiece
        or tiktoken tokenizer.model, a llama2.c tokenizer.bin, or a GGUF file.

        Raises:
            InputError: no such file, none of these, or it names no end-of-text token.
        """
        return cls.of(reader.read(fspath(path)))

    @classmethod
    def of(cls, parts: Parts) -> Tokenizer:
        """The tokenizer of a reader's or a trainer's parts."""
        return cls(**vars(parts))

    @classmethod
    def from_transformers(cls, tokenizer: Any) -> Tokenizer:
        """The tokenizer of an object of transformers, through its files; one of ours as it is.

        Raises:
            InputError: another object, or one without tokenizer.json.
        """
        if isinstance(tokenizer, cls):
            return tokenizer
        if not hasattr(tokenizer, "save_pretrained"):
            what, expected = "this is no tokenizer", "a Tokenizer, or one of transformers"
            raise InputError(what, where="tokenizer", found=type(tokenizer).__name__, expected=expected)
        with TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            return cls.load(folder)

    @property
    def parts(self) -> Parts:
        """The arguments that make this tokenizer."""
        own = self.eos_token, self._bos, self.add_bos
        return Parts(self.backend, *own, self._config, self._model, self._encoder, self._stops)

    @checked
    def save(self, folder: str | PathLike[str], max_length: int | None = None) -> None:
        """Write tokenizer.json and tokenizer_config.json, which transformers' AutoTokenizer loads.

        And the SentencePiece file that it came from, as tokenizer.model. `max_length`: the model's context in tokens.
        """
        (folder := Path(folder)).mkdir(parents=True, exist_ok=True)
        replace_text(folder / "tokenizer.json", self.backend.to_str(pretty=True))
        if self._model:
            replace_file(folder / "tokenizer.model", lambda path: path.write_bytes(self._model))
        self.save_settings(folder, max_length)

    def save_settings(self, folder: Path, max_length: int | None = None) -> None:
        """Write tokenizer_config.json alone, beside a vocabulary of any format; see `save`."""
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": self.bos_token if self.has_bos else None,
            "eos_token": self.eos_token,
            "add_bos_token": self.add_bos,
            "clean_up_tokenization_spaces": False,
            **self._config,
        }
        settings.pop("chat_template", None)
        if templates := self.chat_templates:
            named = [{"name": name, "template": template} for name, template in templates.items()]
            settings["chat_template"] = named if templates.keys() != {"default"} else self.chat_template
        if max_length is not None:
            settings["model_max_length"] = max_length
        if self._encoder is not None:
            settings[ENCODE_WITH] = "tokenizer.model"
        replace_text(folder / "tokenizer_config.json", json.dumps(settings, indent=2, ensure_ascii=False) + "\n")

    def with_special(self, names: Sequence[str]) -> Tokenizer:
        """A tokenizer with the special tokens that it lacks appended behind its highest id.

        Raises:
            InputError: one of them is an ordinary token already; or ids below the highest are unassigned, and
                the new tokens would fill them.
        """
        known = {name: i for name in names if (i := self.backend.token_to_id(name)) is not None}
        ordinary = [name for name, i in known.items() if i not in self.special_ids]
        if ordinary:
            what = "this special token is an ordinary token of the vocabulary already, and texts would lose it"
            raise InputError(what, found=", ".join(ordinary), fix="give it another name")
        if len(known) == len(names):
            return self
        count = self.backend.get_vocab_size(with_added_tokens=True)
        if count < self.vocab_size:
            found = f"{count} tokens, highest id {self.vocab_size - 1}"
            raise InputError("a vocabulary with unassigned ids takes no further tokens", found=found)
        backend = Backend.from_str(self.backend.to_str())
        backend.add_special_tokens(list(names))
        return Tokenizer.of(replace(self.parts, backend=backend))

    def with_chat_template(self, template: str) -> Tokenizer:
        """The tokenizer with another default chat template, Jinja; others that it has by name stay."""
        config = {**self._config, "chat_template": {**self.chat_templates, "default": template}}
        return Tokenizer.of(replace(self.parts, config=config))

    @checked
    def encode(self, text: str, bos: bool = False, special: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            bos: prepend `bos_id`.
            special: parse the names of special tokens as these tokens. Only for text that the program
                wrote itself (chat templates): in a user's text they are plain characters.

        Raises:
            InputError: the text holds a lone surrogate.
        """
        ids = self.special(self.special.code(check_unicode(text))).ids if special else self.encode_batch([text])[0]
        return [self.bos_id] * bos + ids

    __call__ = encode

    def __len__(self) -> int:
        return self.vocab_size

    def encode_inside(self, text: str) -> list[int]:
        """Token ids of a text that continues another.

        They are `encode`'s except for vocabularies with a dummy prefix.
        """
        return self.encode_batch([text], [True])[0]

    @checked
    def encode_batch(self, texts: Iterable[str], inside: Sequence[bool] = ()) -> list[list[int]]:
        """Token ids per text, encoded on all cores; where `inside` is true, as by `encode_inside`."""
        texts, rest = list(texts), {i for i, is_inside in enumerate(inside) if is_inside}
        rows = self._encode(["" if i in rest else text for i, text in enumerate(texts)])
        for before in ("\n", "|", "~", ""):
            if not rest:
                break
            start, *longer = self._encode([before, *(before + texts[i] for i in sorted(rest))])
            for i, row in zip(sorted(rest), longer, strict=True):
                if not before or (start and row[: len(start)] == start):  # no token crosses the boundary
                    rows[i] = row[len(start) * bool(before) :]
                    rest.remove(i)
        return rows

    def _encode(self, texts: list[str]) -> list[list[int]]:
        own = self._encoder
        return own.encode(list(map(check_unicode, texts))) if own else encode_texts(self.backend, texts)

    @checked
    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of token ids; U+FFFD replaces bytes that are not valid UTF-8.

        Raises:
            InputError: an id outside the vocabulary.
        """
        ids = list(ids)
        for bad in (i for i in ids if not 0 <= i < self.vocab_size):
            raise InputError("this id is not in the vocabulary", found=bad, expected=f"0 to {self.vocab_size - 1}")
        # The library overlooks special tokens that its file calls `normalized`, as Llama 2's does.
        kept = [i for i in ids if not (skip_special and i in self.special_ids)]
        if not self._added_words.keys().isdisjoint(kept):
            stream = self.stream(skip_special)
            return "".join([*map(stream.push, kept), stream.flush()])
        return self.backend.decode(kept, skip_special_tokens=False)

    def stream(self, skip_special: bool = True, after: Sequence[int] = ()) -> StreamDecoder:
        """A streaming detokenizer, `after` the ids of a prompt."""
        return StreamDecoder(self.backend, self.special_ids, skip_special, after)

    @cached_property
    def _added_words(self) -> dict[int, str]:
        return added_words(self.backend)

    @cached_property
    def vocab_size(self) -> int:
        """Rows of the embedding: the highest id plus one, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def check_fits(
        self, vocab_size: int, where: object = None, fix: str | None = None, spares_special: bool = False
    ) -> None:
        """Refuse a model whose vocabulary is smaller: it would lack some of the ids.

        With `spares_special` it may lack special tokens, such as a [PAD] that was added for batches of texts.
        """
        lacks = range(vocab_size, self.vocab_size)
        if lacks and not (spares_special and self.special_ids.issuperset(lacks)):
            found = f"a tokenizer of {self.vocab_size} tokens, a model of {vocab_size}"
            raise InputError("the tokenizer is larger than the model's vocabulary", where=where, found=found, fix=fix)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special tokens."""
        return frozenset(i for i, token in self.backend.get_added_tokens_decoder().items() if token.special)

    @cached_property
    def unknown_id(self) -> int | None:
        """Id of the unknown token; None where there is none."""
        model: dict[str, Any] = to_dict(self.backend)["model"]
        return self.backend.token_to_id(name) if (name := model.get("unk_token")) is not None else model.get("unk_id")

    def surfaces(self, text: str) -> list[tuple[int, str]]:
        """Id and surface form of each token: its piece, or for an unknown token the text that is lost.

        Byte tokens of one character each have that character.
        """
        if self._encoder is not None:
            return list(zip(self._encoder.encode(text), self._encoder.encode(text, out_type=str), strict=True))
        item = self.backend.encode(text, add_special_tokens=False)
        names = (self.backend.id_to_token(i) or "" for i in item.ids)
        rows = zip(item.ids, names, item.offsets, strict=True)
        return [(i, text[start:end] if i == self.unknown_id else name) for i, name, (start, end) in rows]

    def normalized(self, text: str) -> str:
        """The normalized text."""
        if self._encoder is not None:
            return self._encoder.normalize(text)
        return self.backend.normalizer.normalize_str(text) if self.backend.normalizer is not None else text

    @property
    def is_exact(self) -> bool:
        """Whether tokenizer.json is exact; else the SentencePiece library encodes, see `Pieces.is_exact`."""
        return self._encoder is None

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the compact tokenizer.json without `add_bos`: equal where `encode` is."""
        spec = to_dict(self.backend) | {"post_processor": None}
        if self._encoder is not None:
            spec["model"] = self._model.hex()
        return sha256(json.dumps(spec, separators=(",", ":")).encode()).hexdigest()

    @cached_property
    def pre(self) -> str | None:
        """llama.cpp's name of the pre-tokenizer (tokenizer.ggml.pre), None where GGUF cannot express this one."""
        return next((name for name, known in PRE.items() if known == pattern_of(self.backend)), None)

    @cached_property
    def pieces(self) -> Pieces | None:
        """The vocabulary as a SentencePiece BPE model without normalization, None where it is none."""
        if self._encoder is None:
            return Pieces.of(self.backend)
        found = sentencepiece.pieces_of(sentencepiece.message(self._model, "tokenizer.model"), "tokenizer.model")
        return found if found.kind == ModelKind.BPE and not found.charsmap and not found.squeeze else None

    @property
    def chat_templates(self) -> Mapping[str, str]:
        """The Jinja chat templates that the tokenizer came with, by name: `default`, `tool_use` ..."""
        found: str | Mapping[str, str] = self._config.get("chat_template") or {}
        return {"default": found} if isinstance(found, str) else found

    @property
    def chat_template(self) -> str | None:
        """The Jinja chat template, if the tokenizer came with one."""
        return self.chat_templates.get("default")

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """A conversation rendered by the model's chat template; encode it with `special=True`.

        Arguments and errors are a `ChatTemplate`'s; with `tools` the template `tool_use` is taken if there is one.

        Raises:
            InputError: there is no template.
        """
        name = "tool_use" if tools and "tool_use" in self.chat_templates else "default"
        if name not in self.chat_templates:
            raise self.no_chat_template()
        return self._chats[name](messages, add_generation_prompt, tools=tools, **variables)

    def no_chat_template(self) -> InputError:
        """Error of a conversation for which the tokenizer has no chat template."""
        if self.chat_templates:
            found, fix = ", ".join(self.chat_templates), "give tools, for which tool_use is, or a template"
            return InputError("the tokenizer has no default chat template", found=found, fix=fix)
        return InputError("the tokenizer has no chat template", fix="use a model that was trained on conversations")

    @property
    def template_variables(self) -> dict[str, Any]:
        """Variables of chat templates: the names of special tokens."""
        names = {"eos_token": self.eos_token} | ({"bos_token": self.bos_token} if self.has_bos else {})
        return {key: self._config[key] for key in ("unk_token", "pad_token") if key in self._config} | names

    @cached_property
    def _chats(self) -> dict[str, ChatTemplate]:
        variables = self.template_variables
        return {name: ChatTemplate(template, variables) for name, template in self.chat_templates.items()}

    @cached_property
    def special(self) -> SpecialEncoder:
        """Encoder of texts in which special tokens stand beside plain text."""
        # not id_to_token, which normalizes the names of tokens that their file calls `normalized`
        names = {token.content: i for i, token in self.backend.get_added_tokens_decoder().items() if token.special}
        own = {self.bos_token: self.bos_id, self.eos_token: self.eos_id}
        return SpecialEncoder(self.backend, names | own, self._encoder)
