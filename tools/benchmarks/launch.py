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
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)
    wall_s = time.perf_counter() - started_s
    handed_bytes = _handed_bytes(child)
    _, status, usage = os.wait4(child, 0)
    with open(report, "w") as file:
        file.write(
            f'{{"wall_s": {wall_s!r}, "user_s": {usage.ru_utime!r}, "system_s": {usage.ru_stime!r},'
            f' "peak_rss_bytes": {usage.ru_maxrss * 1024},'
            f' "written_bytes": {usage.ru_oublock * SECTOR_BYTES},'
            f' "handed_bytes": {handed_bytes}}}'
        )
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


def _handed_bytes(process: int) -> int:
    """What a process that has ended, but was not waited for, handed to write calls; 0 where the
    kernel does not count."""
    try:
        with open(f"/proc/{process}/io") as file:
            counts = dict(line.split(": ") for line in file)
    except OSError:
        return 0
    return int(counts["wchar"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
