"""Accounting of the files that are left out: bounded, and with the names of any system."""

from __future__ import annotations

import json

from minillama.data.skipped import Remark, Skipped


def test_names_are_escaped_and_bounded() -> None:
    report, other = Skipped(), Skipped()
    for number in range(1500):
        report.remark(Remark(".jpg", file=f"{number}.jpg"))
    other.remark(Remark(".jpg", file="caf\udce9.jpg"))
    other.remark(Remark("empty", file="a\nb.txt"))
    other.merge(report)
    count, names = other.files[".jpg"]
    assert count == 1501 and len(names) == 1000 and names[:2] == ["caf\\udce9.jpg", "0.jpg"]
    assert len(report.files[".jpg"][1]) == 1000  # its own list as before
    json.dumps(other.record(), ensure_ascii=False).encode()
    assert str(other) == "files left out: 1,501 .jpg (caf\\udce9.jpg, 0.jpg, 1.jpg and 1,498 more), 1 empty (a\\nb.txt)"
