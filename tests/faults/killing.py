"""Kill -9 of a process by itself at a change of the file system: the interpreter's audit events come before each.

Scripts of tests have a copy of this file beside them.
"""

import os
import re
import signal
import sys

EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree"}


def kill_at_change(number: int, within: str, first: str) -> None:
    """Kill this process before change `number` of paths that contain `within`, from one that matches `first` on."""
    count = 0

    def look(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        if event not in EVENTS or within not in (path := str(arguments[0])) or not (count or re.search(first, path)):
            return
        if event == "open" and not arguments[2] & (os.O_WRONLY | os.O_RDWR):  # type: ignore[operator]
            return
        if os.path.lexists(path) if event == "os.mkdir" else event != "open" and not os.path.lexists(path):
            return  # a folder that is there already, a name that is not
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(look)
