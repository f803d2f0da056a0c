"""What must never be merged file by file: a database is one state in several files.

Two kinds. A file with its companions (SQLite: `X`, `X-wal`, `X-shm`, `X-journal`), known by their
names. A directory that holds a database (PostgreSQL, MySQL, MongoDB, Redis, LevelDB and their
kin), known by marker files in any version of it, or by a pattern of the settings.
"""

from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Final

from dmsync.core.objects import Entry, EntryKind
from dmsync.core.pages import PageReader, directory_entries, find_entry, find_path

COMPANIONS: Final = (b"-wal", b"-shm", b"-journal")
"""Endings of the files that belong to a SQLite database of the name before them."""
MEMBERS: Final = (b"", *COMPANIONS)

_Marker = Callable[[PageReader, Entry], bool]


def _has(reader: PageReader, directory: Entry, name: bytes) -> bool:
    return find_entry(reader, directory.tree, name) is not None


def _any_name(reader: PageReader, directory: Entry, pattern: str) -> bool:
    return any(
        fnmatchcase(entry.name.decode("utf-8", "surrogateescape"), pattern)
        for entry in directory_entries(reader, directory.tree)
    )


def _is_postgresql(reader: PageReader, directory: Entry) -> bool:
    return _has(reader, directory, b"PG_VERSION") and (
        find_path(reader, directory, b"global/pg_control") is not None
    )


def _is_mysql(reader: PageReader, directory: Entry) -> bool:
    return _has(reader, directory, b"ibdata1")


def _is_mongodb(reader: PageReader, directory: Entry) -> bool:
    return _has(reader, directory, b"WiredTiger")


def _is_redis(reader: PageReader, directory: Entry) -> bool:
    if _has(reader, directory, b"appendonlydir"):
        return True
    return _has(reader, directory, b"appendonly.aof") and _any_name(reader, directory, "*.rdb")


def _is_leveldb(reader: PageReader, directory: Entry) -> bool:
    return _has(reader, directory, b"CURRENT") and _any_name(reader, directory, "MANIFEST-*")


_MARKERS: Final[tuple[_Marker, ...]] = (
    _is_postgresql,
    _is_mysql,
    _is_mongodb,
    _is_redis,
    _is_leveldb,
)


def is_unit_directory(
    reader: PageReader,
    path: bytes,
    versions: Iterable[Entry | None],
    patterns: Sequence[str] = (),
) -> bool:
    """Whether any version of the directory at `path` holds a database, or a pattern names it.

    A pattern fits the path from the dot's root, or the last name.
    """
    text = path.decode("utf-8", "surrogateescape")
    name = text.rpartition("/")[2]
    if path and any(fnmatchcase(text, p) or fnmatchcase(name, p) for p in patterns):
        return True
    return any(
        marker(reader, version)
        for version in versions
        if version is not None and version.kind is EntryKind.DIRECTORY and version.tree is not None
        for marker in _MARKERS
    )


def covering_unit(
    reader: PageReader, roots: Sequence[Entry], path: bytes, patterns: Sequence[str] = ()
) -> bytes | None:
    """Path of the outermost unit directory that `path` is or lies in, in any of the trees."""
    parts = path.split(b"/")
    for depth in range(len(parts) + 1):
        above = b"/".join(parts[:depth])
        versions = [find_path(reader, root, above) for root in roots]
        if is_unit_directory(reader, above, versions, patterns):
            return above
    return None


def stem_of(name: bytes) -> bytes:
    """The database's name that `name` would be a companion of; `name` itself if of none."""
    for ending in COMPANIONS:
        if name.endswith(ending) and len(name) > len(ending):
            return name[: -len(ending)]
    return name


def is_file_unit(versions: Iterable[set[bytes]]) -> bool:
    """Whether some version has a database with a companion; versions are the endings (of MEMBERS)
    under which there are regular files."""
    return any(b"" in endings and len(endings) > 1 for endings in versions)
