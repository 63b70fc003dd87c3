"""UTF-8 recovery: decoding invalid bytes to the most characters, by dynamic programming.

A model on bytes may generate invalid UTF-8. Wang, Cho and Gu 2020 (arXiv 1909.03341, §3.2):
f(k) = max over t in 1..4 of f(k - t) + g(k - t, k), where g is 1 if these t bytes are one valid character; the
choices are traced back from the end. UTF-8 is made so that the answer is unique.
"""

from __future__ import annotations


def recover(data: bytes, replacement: str = "\ufffd") -> str:
    """UTF-8 recovery: the decoding with the most characters; each other byte becomes `replacement`."""
    best = [0] + [-1] * len(data)  # characters in the first k bytes
    length = [0] * (len(data) + 1)  # bytes of the last of them; 0: the last byte is invalid
    for k in range(1, len(data) + 1):
        best[k] = best[k - 1]
        for t in range(1, min(4, k) + 1):
            if best[k - t] + 1 > best[k] and is_character(data[k - t : k]):
                best[k], length[k] = best[k - t] + 1, t
    parts, k = [], len(data)
    while k:
        t = length[k]
        parts.append(data[k - t : k].decode() if t else replacement)
        k -= t or 1
    return "".join(reversed(parts))


def is_character(data: bytes) -> bool:
    """Whether these 1 to 4 bytes are the UTF-8 of one character."""
    try:
        return len(data.decode()) == 1
    except UnicodeDecodeError:
        return False
