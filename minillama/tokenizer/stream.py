"""Streaming detokenizer."""

from __future__ import annotations

import codecs
import json
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from minillama.tokenizer.pre import piece_bytes
from minillama.tokenizer.reference.byte_fallback import BYTE

_PER_TOKEN = {"Replace", "ByteFallback", "Metaspace", "WordPiece"}  # decoder steps


class StreamDecoder:
    """Incremental detokenization: all pushes plus the flush equal `decode` of all the ids.

    Incomplete characters are buffered. The time per push is constant. (tokenizers' own DecodeStream waits
    forever, and slows down, after bytes that are not valid UTF-8, and it has no flush.) Where the text of a token
    depends on more than its neighbors, as with the suffixes of old BPE vocabularies, all of it comes at the flush.

    With `skip_special`, special tokens give no text; `after` are the ids of the prompt.
    """

    def __init__(
        self, backend: Backend, special_ids: frozenset[int], skip_special: bool = True, after: Sequence[int] = ()
    ) -> None:
        self._backend = backend
        self._skipped = special_ids if skip_special else frozenset()
        is_byte_level = isinstance(self._backend.decoder, decoders.ByteLevel)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if is_byte_level else None
        self._words = added_words(backend)
        self._held: tuple[bytes, str] | None = None  # a byte, or an added word that looks like one
        state = backend.decoder.__getstate__() if backend.decoder else b"null"
        self._is_local = is_byte_level or _is_local(json.loads(state))
        # One token of context: SentencePiece strips the space of a sequence's first token. Not a byte token, which
        # would be decoded together with those that follow, though its run is complete.
        texts = (i for i in reversed(after) if i not in special_ids and not self._is_byte(i))
        self._context = list(islice(texts, int(self._is_local)))
        self._pending: list[int] = []  # a run of byte tokens, valid UTF-8 or not as a whole

    def push(self, token: int) -> str:
        """The text completed by this token: none or more characters."""
        piece = self._backend.id_to_token(token)
        if piece is None or token in self._skipped:
            return ""
        if self._utf8 is not None:
            return self._push_bytes(piece_bytes(piece), self._words.get(token))
        self._pending.append(token)
        return "" if self._is_byte(token) or not self._is_local else self._take()

    def flush(self) -> str:
        """The rest: U+FFFD for an incomplete character. Resets the stream."""
        if self._utf8 is not None:
            return self._settle(b"") + self._utf8.decode(b"", final=True)
        text = self._take()
        self._context = []
        return text

    def _push_bytes(self, data: bytes, word: str | None) -> str:
        """Text completed by the bytes of a token, or by an added word, which is none of them.

        An added word of one letter may have the id of a byte. It is the byte within a character, the word elsewhere.
        """
        text = self._settle(data)
        assert self._utf8 is not None
        if word is None or (len(word) == 1 and self._utf8.getstate()[0]):
            return text + self._utf8.decode(data)
        if len(word) == 1 and data[0] >= 0xC2:  # it may begin a character
            self._held = data, word
            return text
        return text + self._utf8.decode(b"", final=True) + word

    def _settle(self, following: bytes) -> str:
        """Text of what is held, by the token that follows it."""
        held, self._held = self._held, None
        if held is None or self._utf8 is None:
            return ""
        if following and 0x80 <= following[0] < 0xC0:
            return self._utf8.decode(held[0])
        return self._utf8.decode(b"", final=True) + held[1]

    def _is_byte(self, token: int) -> bool:
        return BYTE.fullmatch(self._backend.id_to_token(token) or "") is not None

    def _take(self) -> str:
        before = self._backend.decode(self._context, skip_special_tokens=False)
        text = self._backend.decode(self._context + self._pending, skip_special_tokens=False)[len(before) :]
        self._context, self._pending = self._pending[-1:], []
        return text


def added_words(backend: Backend) -> dict[int, str]:
    """Added tokens of a byte-level vocabulary with letters of the byte alphabet, which are text and no bytes."""
    if not isinstance(backend.decoder, decoders.ByteLevel):
        return {}
    words = {i: token.content for i, token in backend.get_added_tokens_decoder().items()}
    return {i: word for i, word in words.items() if piece_bytes(word) != word.encode()}


def _is_local(decoder: Mapping[str, Any] | None) -> bool:
    """Whether the text of a token depends on the token before it and, in a run of byte tokens, on the run alone."""
    steps = (decoder or {}).get("decoders", [decoder or {"type": "WordPiece"}])
    kinds = [step["type"] for step in steps]
    before = kinds[: kinds.index("Fuse")] if "Fuse" in kinds else kinds
    strips = all(step["stop"] == 0 for step in steps if step["type"] == "Strip")
    return strips and {*kinds} - {*before} <= {"Fuse", "Strip"} and {*before} <= _PER_TOKEN
