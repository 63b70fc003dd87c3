"""GGUF vocabulary export (`tokenizer.*` keys)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from minillama.errors import InputError
from minillama.formats.generation_config import STOP_IDS
from minillama.tokenizer.gguf import PREFIX, TEMPLATE, end_of_turn
from minillama.tokenizer.pre import BYTE_TO_CHAR, PRE
from minillama.tokenizer.sentencepiece_vocab import PieceType
from minillama.tokenizer.spec import by_id, to_dict
from minillama.tokenizer.tokenizer import Tokenizer


def vocabulary(tokenizer: Tokenizer, rows: int, stop_ids: frozenset[int] = frozenset()) -> dict[str, Any]:
    """The keys for an embedding of `rows` rows; rows without a token get an unused one.

    Args:
        rows: of the embedding.
        stop_ids: of the model, besides the tokenizer's.

    Raises:
        InputError: llama.cpp has no equivalent tokenizer.
    """
    pieces = tokenizer.pieces
    if pieces is None and tokenizer.pre is None:
        raise InputError(
            "GGUF cannot express this tokenizer",
            found=type(tokenizer.backend.model).__name__,
            expected=f"byte-level BPE of pattern {', '.join(PRE)}, or SentencePiece's BPE with byte fallback",
        )
    tokenizer.check_fits(rows)
    types: Mapping[int, int]
    if pieces is not None:
        names, types = dict(enumerate(pieces.names)), dict(enumerate(pieces.types))
        values = {"model": "llama", "pre": "default", "add_space_prefix": pieces.dummy_prefix}
        values["scores"] = [*pieces.scores, *[-1e9] * (rows - len(names))]
    else:
        names, spec = by_id(tokenizer.backend), to_dict(tokenizer.backend)
        special = {token["content"]: token["special"] for token in spec["added_tokens"]}
        kinds = {None: PieceType.NORMAL, True: PieceType.CONTROL, False: PieceType.USER_DEFINED}
        types = {i: kinds[special.get(name)] for i, name in names.items()}
        merges = [" ".join(pair) for pair in spec["model"]["merges"]]
        # a list without entries is not written, and then llama.cpp finds none
        merges = merges or [f"{BYTE_TO_CHAR[0]} {BYTE_TO_CHAR[0]}"]
        values = {"model": "gpt2", "pre": tokenizer.pre, "merges": merges}
    tokens = values["tokens"] = [names.get(i, f"[PAD{i}]") for i in range(rows)]
    values["token_type"] = [int(types.get(i, PieceType.UNUSED)) for i in range(rows)]
    values |= {"eos_token_id": tokenizer.eos_id, "add_bos_token": tokenizer.add_bos}
    values |= {"bos_token_id": tokenizer.bos_id} if tokenizer.has_bos else {}
    keys = {PREFIX + key: value for key, value in values.items()}
    keys |= _ends(tokens, (tokenizer.stop_ids | stop_ids) - {tokenizer.eos_id})
    templates = tokenizer.chat_templates
    others = [name for name in templates if name != "default"]
    keys |= {f"{TEMPLATE}s": others} if others else {}
    return keys | {TEMPLATE if name == "default" else f"{TEMPLATE}.{name}": text for name, text in templates.items()}


def _ends(names: Sequence[str], ids: Iterable[int]) -> dict[str, Any]:
    """Keys of the ids that end a turn: one for turns, one for messages, and a list of those that no name gives away."""
    groups: dict[str, list[int]] = {"turn": [], "message": [], "other": []}
    known = end_of_turn(names)
    for i in sorted(i for i in ids if i < len(names)):
        kind = "message" if names[i] == "<|eom_id|>" else "turn" if names[i] in known else "other"
        groups[kind].append(i)
    turn = (groups["turn"] + groups["other"])[:1]
    message = (groups["message"] + [i for i in groups["other"] if i not in turn])[:1]
    others = [i for i in groups["other"] if i not in turn + message]
    pairs = [(f"{PREFIX}eot_token_id", turn), (f"{PREFIX}eom_token_id", message)]
    return {key: found[0] for key, found in pairs if found} | ({STOP_IDS: others} if others else {})
