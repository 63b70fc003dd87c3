"""FineWeb's rules: end marks, short and repeated lines, lists (arXiv 2406.17557, section 3.5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minillama.data.cleaning.document import Draft, Figures, Step
from minillama.data.cleaning.gopher import duplicates
from minillama.data.cleaning.words import words

# end marks of sentences: Unicode's property Sentence_Terminal, in the scripts of more than ten million people
ENDS = frozenset(".!?‼‽⁇⁈⁉⸮｡。．！？﹒﹖﹗։؞؟۔܀܁܂।॥၊။።፧፨។៕᠃᠉꓿꘎꘏꛳꛷꣎꣏꤯꧈꧉꩝꩞꩟꫰꫱꯫᭚᭛᭞᭟᰻᰼᱾᱿᪨᪩᪪᪫᥄᥅᜵᜶᙮߹")


@dataclass(frozen=True)
class FineWeb(Step):
    """FineWeb's rules, as shares of the lines that are not blank."""

    name: Literal["fineweb"] = "fineweb"
    short_line: int = 30
    """Characters of a short line."""
    min_lines: int = 1
    min_punctuated_lines: float = 0.12
    max_short_lines: float = 0.67
    max_duplicate_line_characters: float = 0.01
    max_newlines: float = 0.3
    """Newlines per word."""

    def measure(self, draft: Draft) -> Figures:
        text = draft.text
        lines = [line for line in text.split("\n") if line.strip()]
        if not lines:
            return {"lines": 0}
        newlines = text.count("\n")
        return {
            "lines": len(lines),
            "punctuated_lines": sum(line[-1] in ENDS for line in lines) / len(lines),
            "short_lines": sum(len(line) <= self.short_line for line in lines) / len(lines),
            "duplicate_line_characters": duplicates(lines)[1] / (len(text) - newlines),
            "newlines": newlines / max(len(words(text)), 1),
        }
