"""Reads a trace for what was not durable yet when a command said that it was done.

A kill does not show it, the page cache outlives that; a power cut shows it by chance. The order of
system calls shows it each time: at the moment of the acknowledgement each file of the store and
each name in it that the command changed must have been synced since, and so must its working tree.
"""

import os
import re
from typing import Final

from tools.faults.system_calls import SYNCING, WRITING, Call

_LASTING: Final = re.compile(
    r"/(near|far)/(format$|events/[0-9]+\.log$|dots/[0-9a-f]{32}/(packs/[^/]+\.pack$|trees/))|/tree/"
)
"""What must outlive a power cut. Projections, caches, lock files and proofs of life need not."""
_LASTING_NAMES: Final = re.compile(
    r"/(near|far)(/events|/dots(/[0-9a-f]{32}/packs)?)?$|/tree$|/tree/"
)
_PASSING_NAME: Final = re.compile(
    r"\.tmp-|/tmp-|\.dm-tmp-|\.sqlite|\.lock$|/lock$|\.stat$|/transfers"
)
_MADE_AT: Final = {
    "rename": (None, 1),
    "renameat": (2, 3),
    "renameat2": (2, 3),
    "link": (None, 1),
    "linkat": (2, 3),
    "symlink": (None, 1),
    "symlinkat": (1, 2),
    "mkdir": (None, 0),
    "mkdirat": (0, 1),
    "unlink": (None, 0),
    "unlinkat": (0, 1),
    "rmdir": (None, 0),
}
"""Positions of the directory descriptor and of the path of the name that is made or goes."""
_CREATED_AT: Final = {"open": (None, 0), "openat": (0, 1), "creat": (None, 0)}


class SyncOrder:
    """Is told each call before it is made. `is_server`: what is acknowledged goes over a pipe, and
    only the event log is judged: packs of a transfer that goes on are acknowledged otherwise."""

    def __init__(self, *, is_server: bool = False) -> None:
        self._is_server = is_server
        self._files: set[str] = set()
        self._directories: set[str] = set()
        self.problems: list[str] = []
        self.has_acknowledged = False

    def note(self, call: Call) -> None:
        """Take account of a call; at the acknowledgement, judge."""
        if self._is_telling(call):
            self._judge()
        elif call.name in WRITING or call.name in ("ftruncate", "fallocate", "copy_file_range"):
            at = 2 if call.name == "copy_file_range" else 0
            self._change(call.path_of(call.arguments[at]))
        elif call.name in SYNCING:
            path = call.path_of(call.arguments[0])
            self._files.discard(path)
            self._directories.discard(path)
        elif call.name in ("sync", "syncfs"):
            self._files.clear()
            self._directories.clear()
        elif call.name in _MADE_AT:
            self._name(call, *_MADE_AT[call.name])
        elif call.name in _CREATED_AT and _creates(call):
            self._name(call, *_CREATED_AT[call.name])

    def _is_telling(self, call: Call) -> bool:
        """Is it the summary, or, of a server, anything for the peer?"""
        if call.name not in WRITING:
            return False
        if self._is_server:
            return call.path_of(call.arguments[0]).startswith("pipe:")
        return call.arguments[0] == 1 and b'"summary"' in call.memory(*call.arguments[1:3])

    def _change(self, path: str) -> None:
        path = path.removesuffix(" (deleted)")
        if _LASTING.search(path) or "/tmp-" in path or ".tmp-" in path:
            self._files.add(path)

    def _name(self, call: Call, directory_at: int | None, path_at: int) -> None:
        path = _resolved(call, directory_at, path_at)
        if call.name.startswith("rename"):  # what was written under the old name has the new one
            old = _resolved(call, *((None, 0) if directory_at is None else (0, 1)))
            if old in self._files:
                self._files.discard(old)
                self._files.add(path)
        above = os.path.dirname(path)
        if _LASTING_NAMES.search(above) and not _PASSING_NAME.search(path):
            self._directories.add(above)

    def _judge(self) -> None:
        self.has_acknowledged = True
        files = {path for path in self._files if _LASTING.search(path)}
        waiting = files | self._directories
        if self._is_server:
            waiting = {path for path in waiting if "/events" in path}
        for path in sorted(waiting):
            told = f"said to be done before {'/'.join(path.split('/')[-4:])} was synced"
            if told not in self.problems:
                self.problems.append(told)


def _creates(call: Call) -> bool:
    """Does an open with O_CREAT make a name that is not there?"""
    if call.name == "creat":
        return True
    flags = call.arguments[1 if call.name == "open" else 2]
    return bool(flags & os.O_CREAT) and not os.path.lexists(
        _resolved(call, *_CREATED_AT[call.name])
    )


def _resolved(call: Call, directory_at: int | None, path_at: int) -> str:
    """The absolute path that a call names."""
    path = call.text(call.arguments[path_at])
    if path.startswith("/"):
        handle = re.match(r"/proc/self/fd/([0-9]+)(/.*)?$", path)
        return (
            call.path_of(int(handle[1])) + (handle[2] or "") if handle else os.path.normpath(path)
        )
    descriptor = -100 if directory_at is None else _signed(call.arguments[directory_at])
    base = (
        os.readlink(f"/proc/{call.thread}/cwd") if descriptor == -100 else call.path_of(descriptor)
    )
    return os.path.normpath(os.path.join(base, path))


def _signed(value: int) -> int:
    """The int that the lower half of a register holds."""
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value & 0x80000000 else value
