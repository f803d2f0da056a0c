"""Names that some filesystems take for one (case, composed letters, invisible characters): two
recorded names must never become one file or directory there.

Which names may be alike is guessed widely from their text; whether they are, the filesystem says.
"""

import os
from collections.abc import Collection, Sequence
from typing import Final

from dmsync.engine.safe_files import remove_name, temporary_name

_IGNORED_AT_END: Final = b". "
_CREATE_FLAGS: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


def alike(names: Collection[bytes]) -> list[list[bytes]]:
    """Groups of names that a filesystem might not tell apart, in their order; mostly none."""
    if len({_folded(name) for name in names}) == len(names):
        return []
    groups: dict[bytes, list[bytes]] = {}
    for name in names:
        groups.setdefault(_folded(name), []).append(name)
    return [group for group in groups.values() if len(group) > 1]


def _folded(name: bytes) -> bytes:
    if name.isascii():
        return name.lower().rstrip(_IGNORED_AT_END)
    from unicodedata import category, normalize  # slow to import, and most names need none of it

    text = normalize("NFKD", name.decode("utf-8", "surrogateescape")).casefold()
    text = normalize("NFKD", "".join(c for c in text if category(c) not in ("Cf", "Mn", "Cn")))
    return text.encode("utf-8", "surrogateescape").lower().rstrip(_IGNORED_AT_END)


def not_told_apart(directory_fd: int, names: Sequence[bytes]) -> set[bytes]:
    """Those of `names` that the filesystem of this directory takes for one before them: tried out
    with empty files in a directory of our own, gone afterwards. Raises OSError, StorageFailed."""
    probe = temporary_name()
    os.mkdir(probe, 0o700, dir_fd=directory_fd)
    same = set()
    try:
        fd = os.open(probe, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=directory_fd)
        try:
            for name in names:
                try:
                    os.close(os.open(name, _CREATE_FLAGS, 0o600, dir_fd=fd))
                except FileExistsError:
                    same.add(name)
        finally:
            os.close(fd)
    finally:
        remove_name(probe, directory_fd, probe)
    return same
