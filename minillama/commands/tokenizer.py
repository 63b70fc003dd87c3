"""Tokenizers: train, merge, encode, decode, explain, compare."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from minillama.commands.tables import print_table
from minillama.data.skipped import BadText
from minillama.data.sources import Source, documents
from minillama.errors import InputError
from minillama.files import refuse_url, replace_folder
from minillama.tokenizer.compare import Figures, measure, plot
from minillama.tokenizer.reference.bpe import Ties
from minillama.tokenizer.tokenizer import Tokenizer
from minillama.tokenizer.train import Kind, TokenizerTrainer


@dataclass(frozen=True)
class Train:
    """Train a tokenizer and write its folder."""

    kind: Kind
    """Tokenization algorithm; see docs/tokenizers.md."""
    input: tuple[str, ...]
    """Training text: files, folders, globs, JSONL, .gz, .zst, python-docs, python-code, hf:NAME."""
    output: str
    """Output folder; it must not exist."""
    vocab_size: int = 0
    """Vocabulary size. 0: as large as the text makes it (char, word), 257 (bytes), otherwise at most 4096."""
    pattern: Literal["gpt-2", "llama-3", "cl100k", "smollm"] | None = None
    """byte-bpe: pre-tokenization pattern; gpt-2 unless given."""
    reference: tyro.conf.FlagCreatePairsOff[bool] = False
    """Train with the reference code of minillama/tokenizer/reference."""
    ties: Ties = "library"
    """byte-bpe, bpe: tie-breaking between equally frequent pairs; all but `library` use the reference code."""
    score: Literal["count", "information"] = "count"
    """wordpiece: score of a pair, its count or its mutual information; `information` uses the reference code."""
    model_type: Literal["unigram", "bpe"] = "unigram"
    """sentencepiece: segmentation algorithm."""
    normalization: Literal["nmt_nfkc", "nfkc", "nmt_nfkc_cf", "nfkc_cf", "identity"] = "nmt_nfkc"
    """sentencepiece: text normalization; identity keeps every space."""
    character_coverage: float = 0.9995
    """sentencepiece: share of the text's characters in the vocabulary, 0.98 to 1."""
    special: tuple[str, ...] = ()
    """Further special tokens, such as [PAD]; they count towards --vocab-size."""

    def run(self) -> int:
        """Train and save."""
        free = ("char", "word", "bytes")
        trainer = TokenizerTrainer(
            self.kind,
            self.vocab_size or (0 if self.kind in free else 4096),
            self.pattern or ("gpt-2" if self.kind == "byte-bpe" else TokenizerTrainer.pattern),
            self.ties,
            self.score,
            self.model_type,
            self.normalization,
            self.character_coverage,
            self.reference,
            full=bool(self.vocab_size),
            special=self.special,
        )
        _free(self.output)
        return _save(trainer(_texts(self.input)), self.output)


@dataclass(frozen=True)
class Merge:
    """Extend a vocabulary by the tokens of another one, or by the most frequent new characters of a text."""

    base: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="BASE")]
    """A SentencePiece BPE model or byte-level BPE; its ids do not change."""
    extra: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="EXTRA")] = None
    """Another of the same kind, whose tokens are appended."""
    output: Annotated[str, tyro.conf.arg(metavar="DIR")] = ""
    """Output folder; it must not exist."""
    add_characters: int = 0
    """Number of characters of --input to append, the most frequent that are not tokens yet (Ziya)."""
    input: tuple[str, ...] = ()
    """Text whose characters are counted."""
    special: tuple[str, ...] = ()
    """Special tokens to append, such as [PAD]."""

    def run(self) -> int:
        """Merge and save."""
        from minillama.tokenizer.merge import extend

        if not self.output:
            raise InputError("--output is missing", where="command line", fix="name the folder to write")
        if self.add_characters and not self.input:
            raise InputError("--add-characters counts the characters of --input", where="--input", found="no texts")
        _free(self.output)
        made = extend(self.base, self.extra, self.add_characters, _texts(self.input), self.special)
        if made.characters < self.add_characters:
            print(f"the texts hold {made.characters} new characters, not {self.add_characters}", file=sys.stderr)
        parts = f"{made.merged} tokens, {made.characters} characters, {len(self.special)} special tokens"
        print(f"added {parts}", file=sys.stderr)
        return _save(made.tokenizer, self.output)


@dataclass(frozen=True)
class _Loaded:
    model: Annotated[str, tyro.conf.arg(metavar="PATH")]
    """Tokenizer file or folder."""

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of that file."""
        return Tokenizer.load(self.model)


@dataclass(frozen=True)
class Encode(_Loaded):
    """Print the token ids of a text."""

    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """The text, or - for standard input."""
    pieces: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the token pieces, too, one per line."""

    def run(self) -> int:
        """Encode."""
        tokenizer = self.tokenizer()
        ids = tokenizer.encode(_text(self.text))
        if self.pieces:
            print("\n".join(f"{i}\t{tokenizer.backend.id_to_token(i)!r}" for i in ids))
        else:
            print(*ids)
        return 0


@dataclass(frozen=True)
class Decode(_Loaded):
    """Print the text of token ids."""

    ids: Annotated[tuple[int, ...], tyro.conf.Positional, tyro.conf.arg(metavar="ID")]
    """Token ids, one or more."""

    def run(self) -> int:
        """Decode."""
        print(self.tokenizer().decode(self.ids, skip_special=False))
        return 0


@dataclass(frozen=True)
class Explain(_Loaded):
    """Show the segmentation of a text: merges with their ranks, or the lattice with its scores, step by step."""

    text: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="TEXT")]
    """The text, or - for standard input."""
    n_best: Annotated[int, tyro.conf.arg(metavar="N")] = 3
    """Number of best segmentations shown of a unigram model."""

    def run(self) -> int:
        """Explain."""
        from minillama.tokenizer.explain import explain

        for line in explain(self.tokenizer(), _text(self.text), self.n_best):
            print(line)
        return 0


@dataclass(frozen=True)
class Compare:
    """Measure tokenizers on texts: fertility, coverage, unknown rate, bytes per token."""

    models: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PATH")]
    """Tokenizer files or folders; NAME=PATH gives one a name."""
    input: tuple[str, ...]
    """Texts, one block of the table each; every line is a document."""
    plot: str | None = None
    """Plot to write (.png, .svg, .pdf)."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object."""

    def run(self) -> int:
        """Compare."""
        if not self.models:
            fix = "name one or more, by path or NAME=PATH"
            raise InputError("no tokenizer is named", where="command line", fix=fix)
        pairs = [(w, w) if Path(w).exists() else (w.split("=")[0], w.split("=", 1)[-1]) for w in self.models]
        if len(dict(pairs)) < len(pairs):
            raise InputError("two tokenizers have one name", found=", ".join(name for name, _ in pairs))
        is_short = len({Path(name).name for name in self.input}) == len(self.input)
        texts = {
            Path(name).name if is_short else name: [line for text in _texts((name,)) for line in text.split("\n")]
            for name in self.input
        }
        loaded = [(name, Tokenizer.load(path)) for name, path in pairs]
        table = {name: {text: measure(made, lines) for text, lines in texts.items()} for name, made in loaded}
        if self.plot is not None:
            plot(Path(self.plot), table)
        if self.json:
            print(json.dumps({name: {t: asdict(f) for t, f in row.items()} for name, row in table.items()}))
            return 0
        for text in texts:
            headers = ("tokens", "per word", "per char", "bytes per token", "unknown", "covered")
            print_table(text, headers, [(name[-24:], *_cells(row[text])) for name, row in table.items()])
        return 0


Args = Train | Merge | Encode | Decode | Explain | Compare


def run(args: Args) -> int:
    """Run the subcommand."""
    return args.run()


def _cells(f: Figures) -> tuple[str, ...]:
    word = "-" if f.tokens_per_word is None else f"{f.tokens_per_word:.3f}"
    ratios = f"{f.tokens_per_character:.3f}", f"{f.bytes_per_token:.3f}", f"{f.unknown:.2%}", f"{f.coverage:.2%}"
    return f"{f.tokens:,}", word, *ratios


def _texts(names: tuple[str, ...]) -> Iterator[str]:
    try:
        for name in names:
            for document in documents(Source(name)):
                yield document.text
    except BadText as bad:  # its own fix is a setting of training runs
        raise InputError(bad.what, where=bad.where, found=bad.found, expected=bad.expected, fix="correct it") from None
    except InputError as error:
        where = "--input" if error.where == "data.sources" else error.where
        raise error.at(where) from None


def _text(word: str) -> str:
    if word != "-":
        return word
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise InputError("standard input is not UTF-8 text", found=error) from None


def _free(output: str) -> None:
    refuse_url(output)
    if Path(output).exists():
        raise InputError("there is something at the destination", where=output, fix="choose another, or remove it")


def _save(tokenizer: Tokenizer, output: str) -> int:
    replace_folder(Path(output), tokenizer.save)
    names = ", ".join(sorted(file.name for file in Path(output).iterdir()))
    print(f"wrote {output}: {tokenizer.vocab_size} tokens ({names})", file=sys.stderr)
    return 0
