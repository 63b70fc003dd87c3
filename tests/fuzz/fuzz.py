"""Fuzzer: python fuzz.py SEED COUNT [TARGET] damages files and reads them; its errors are those of the project.

The process has an address-space limit, and each case a limit of processor time. Failures are printed as JSON lines; a
process that a signal ends leaves its case in the file of the environment variable CASE.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path

from targets import Target, targets

from minillama.errors import InputError

MEMORY, SECONDS, LONGEST = 1_100 * 2**20, 10, 3000


def check(target: Target, rng: random.Random, place: Path) -> str:
    """Outcome of a case: accepted, refused, or a failure with its place."""
    folder = place / "case"
    path = folder / target.file
    whole = (target.folder / target.file).read_bytes()
    path.write_bytes(target.damage(rng, whole))
    try:
        target.read(folder)
    except InputError as error:
        said = str(error)
        if len(said) > LONGEST or not said.replace("\n", "").isprintable():
            return f"a message of {len(said)} characters: {said[:200]!r}"
        return "refused"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "minillama" in frame.filename]
        at = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
        return f"{type(error).__name__} at {at}: {str(error)[:200]!r}"
    return "accepted"


def main(seed: int, count: int, only: str = "") -> int:
    case = os.open(os.environ.get("CASE", os.devnull), os.O_WRONLY | os.O_CREAT)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        found = {key: each for key, each in targets(place).items() if only in key}
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings of the package about odd files
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
        outcomes, failures = Counter[str](), Counter[str]()
        for key, target in found.items():
            shutil.rmtree(place / "case", ignore_errors=True)
            shutil.copytree(target.folder, place / "case")
            target.read(place / "case")  # whole, as it was written
            for number in range(-(-count // len(found))):
                os.pwrite(case, f"{key} {seed}.{number}".ljust(120).encode(), 0)
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                outcome = check(target, random.Random(f"{key} {seed}.{number}"), place)
                outcomes[outcome if outcome in ("accepted", "refused") else "failed"] += 1
                if outcome not in ("accepted", "refused"):
                    failures[f"{key}: {outcome}"] += 1
                    if failures[f"{key}: {outcome}"] == 1 and len(failures) <= 60:
                        print(json.dumps({"case": f"{key} {seed}.{number}", "outcome": outcome}), flush=True)
        print(json.dumps(outcomes))
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:]))
