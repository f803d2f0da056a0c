"""Run `dm` and kill it before the n-th change of a file: `python killed_command.py N WORD...`.

Without reaching it the command ends as it would; the number of changes goes to KILL_COUNT_FILE.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

COUNTED = ("rename", "unlink", "fsync", "ftruncate", "mkdir", "pwrite", "write", "rmdir")


def main() -> int:
    at, words = int(sys.argv[1]), sys.argv[2:]
    count = 0

    def counted(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments, **options)

        return run

    for name in COUNTED:
        setattr(os, name, counted(getattr(os, name)))
    from dmsync.surfaces.cli.main import main as dm

    code = dm(words)
    report = os.environ.get("KILL_COUNT_FILE")
    if report:
        with open(report, "w") as file:
            file.write(str(count))
    return code


if __name__ == "__main__":
    sys.exit(main())
