"""Run a command and write its peak resident size in bytes: peak_memory.py FILE COMMAND ARGUMENT...

A script of its own because a child inherits its parent's peak at the moment of exec: started from a
large pytest process every command would look as large as that. It must stay small, so it is run
with `python -S -E` and imports only os and sys.
"""

import os
import sys


def main(arguments: list[str]) -> int:
    """Exit code of the command (128 + n when signal n ended it)."""
    report, command = arguments[0], arguments[1:]
    child = os.posix_spawnp(command[0], command, os.environ)
    _, status, usage = os.wait4(child, 0)
    with open(report, "w") as file:
        file.write(str(usage.ru_maxrss * 1024))
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
