"""Streaming detokenizer."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import islice

from tokenizers import Tokenizer as Backend
from tokenizers import decoders

from minillama.tokenizer.pre import piece_bytes
from minillama.tokenizer.reference.byte_fallback import BYTE


class StreamDecoder:
    """Incremental detokenization: all pushes plus the flush equal `decode` of all the ids.

    Incomplete characters are buffered. The time per push is constant. (tokenizers' own DecodeStream waits
    forever, and slows down, after bytes that are not valid UTF-8, and it has no flush.)

    With `skip_special`, special tokens give no text; `after` are the ids of the prompt.
    """

    def __init__(
        self, backend: Backend, special_ids: frozenset[int], skip_special: bool = True, after: Sequence[int] = ()
    ) -> None:
        self._backend = backend
        self._skipped = special_ids if skip_special else frozenset()
        is_byte_level = isinstance(self._backend.decoder, decoders.ByteLevel)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace") if is_byte_level else None
        # One token of context: SentencePiece strips the space of a sequence's first token. Not a byte token, which
        # would be decoded together with those that follow, though its run is complete.
        texts = (i for i in reversed(after) if i not in special_ids and not self._is_byte(i))
        self._context = list(islice(texts, 1))
        self._pending: list[int] = []  # a run of byte tokens, valid UTF-8 or not as a whole

    def push(self, token: int) -> str:
        """The text completed by this token: none or more characters."""
        piece = self._backend.id_to_token(token)
        if piece is None or token in self._skipped:
            return ""
        if self._utf8 is not None:
            return self._utf8.decode(piece_bytes(piece))
        self._pending.append(token)
        return "" if self._is_byte(token) else self._take()

    def flush(self) -> str:
        """The rest: U+FFFD for an incomplete character. Resets the stream."""
        text = self._utf8.decode(b"", final=True) if self._utf8 is not None else self._take()
        self._context = []
        return text

    def _is_byte(self, token: int) -> bool:
        return BYTE.fullmatch(self._backend.id_to_token(token) or "") is not None

    def _take(self) -> str:
        before = self._backend.decode(self._context, skip_special_tokens=False)
        text = self._backend.decode(self._context + self._pending, skip_special_tokens=False)[len(before) :]
        self._context, self._pending = self._pending[-1:], []
        return text
