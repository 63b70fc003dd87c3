"""Charset detection: what HTTP or the page declares, UTF-8, what the bytes look like."""

from __future__ import annotations

import codecs
import re

from minillama.data.reading import clean
from minillama.data.skipped import BadText
from minillama.errors import optional_import

_META = re.compile(rb"""<meta[^>]+charset\s*=\s*["']?\s*([\w\-]+)|<\?xml[^>]+encoding\s*=\s*["']([\w\-]+)""", re.I)
# as browsers read these labels (WHATWG)
_LABELS = {"iso-8859-1": "cp1252", "latin-1": "cp1252", "ascii": "cp1252", "us-ascii": "cp1252", "gb2312": "gb18030"}
_LABELS |= {"gbk": "gb18030", "x-gbk": "gb18030", "shift_jis": "cp932", "euc-kr": "cp949", "big5": "big5hkscs"}
_MARKS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"}
_SAMPLE = 2**16


def page_text(data: bytes, where: str, declared: str = "") -> str | BadText:
    """Text of a page's or a file's bytes.

    Args:
        data: the bytes.
        where: their place, for messages.
        declared: charset of the HTTP header.
    """
    for mark, name in _MARKS.items():
        if data.startswith(mark):
            data, declared = data[len(mark) :], name
    meta = _META.search(data, 0, 4096)
    in_page = next(filter(None, meta.groups())).decode() if meta else ""
    text = next((text for name in (declared, in_page, "utf-8") if (text := _decoded(data, name)) is not None), None)
    if text is None:
        best = (
            optional_import("charset_normalizer", "a text that is not UTF-8", "data").from_bytes(data[:_SAMPLE]).best()
        )
        text = _decoded(data, best.encoding if best else "")
    if text is None:
        what = "the charset of this text cannot be told"
        return BadText("wrong charset", what, where=where, found=f"declared: {declared or in_page or 'none'}")
    document = clean(text, where)
    return document if isinstance(document, BadText) else document.text


def _decoded(data: bytes, name: str) -> str | None:
    name = _LABELS.get(name.lower(), name)
    try:
        return data.decode(name) if name else None
    except (LookupError, UnicodeDecodeError, ValueError):
        return None
