"""Run a command and write what it cost as JSON: launch.py REPORT COMMAND ARGUMENT...

A script of its own because a child inherits its parent's peak of memory at the moment of exec, and
because starting from a large process takes longer. It must stay small: `python -S -E`.
"""

import os
import sys
import time

SECTOR_BYTES = 512


def main(arguments: list[str]) -> int:
    """Exit code of the command (128 + n when signal n ended it)."""
    report, command = arguments[0], arguments[1:]
    started_s = time.perf_counter()
    child = os.posix_spawnp(command[0], command, os.environ)
    # The child's figures include those of its own children that it waited for.
    _, status, usage = os.wait4(child, 0)
    wall_s = time.perf_counter() - started_s
    with open(report, "w") as file:
        file.write(
            f'{{"wall_s": {wall_s!r}, "user_s": {usage.ru_utime!r}, "system_s": {usage.ru_stime!r},'
            f' "peak_rss_bytes": {usage.ru_maxrss * 1024},'
            f' "written_bytes": {usage.ru_oublock * SECTOR_BYTES}}}'
        )
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
