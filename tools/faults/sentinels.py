"""Canaries outside of what a command may touch, and whether anything happened to them."""

import hashlib
import os
from typing import Final, NamedTuple

CANARY: Final = b"CANARY-41b6f2c0-do-not-touch\n"
"""What every canary file begins with: no object of a store may hold it."""


class _Seen(NamedTuple):
    mode: int
    inode: int
    links: int
    owner: tuple[int, int]
    size: int
    mtime_ns: int
    ctime_ns: int
    content: str
    attributes: tuple[str, ...]


class Outside:
    """A directory with a file, a secret, a directory, a link and a fifo, as they were found."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file = os.path.join(path, "leaf")
        os.makedirs(os.path.join(path, "below"))
        for name in ("leaf", "data", "below/deep", "victim"):
            with open(os.path.join(path, name), "wb") as file:
                file.write(CANARY + name.encode() * 100)
        os.symlink("leaf", os.path.join(path, "link"))
        os.mkfifo(os.path.join(path, "fifo"))
        self.remember()

    def remember(self) -> None:
        """Take what is there now for what has to stay."""
        self._before = self._seen()

    def harm(self) -> list[str]:
        """What is not as it was, one line each; then remember what is there now."""
        before, now = self._before, self._seen()
        self._before = now
        lines = [f"{path} is gone" for path in sorted(before.keys() - now.keys())]
        lines += [f"{path} is new" for path in sorted(now.keys() - before.keys())]
        for path in sorted(before.keys() & now.keys()):
            for field in _Seen._fields:
                was, found = getattr(before[path], field), getattr(now[path], field)
                if was != found:
                    lines.append(f"{path}: {field} {was} is now {found}")
        return lines

    def _seen(self) -> dict[str, _Seen]:
        found = {}
        names = [""]
        for above, folders, files in os.walk(self.path):
            names += [os.path.relpath(os.path.join(above, n), self.path) for n in folders + files]
        for name in names:
            path = os.path.join(self.path, name)
            status = os.lstat(path)
            content = ""
            if os.path.islink(path):
                content = os.readlink(path)
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    content = hashlib.sha256(file.read()).hexdigest()
            found[name] = _Seen(
                status.st_mode,
                status.st_ino,
                status.st_nlink,
                (status.st_uid, status.st_gid),
                status.st_size,
                status.st_mtime_ns,
                status.st_ctime_ns,
                content,
                tuple(os.listxattr(path, follow_symlinks=False)),
            )
        return found
