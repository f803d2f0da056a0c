"""Where runs begin: three stores, one dot with some history; and how commits are made in them.

Commits are built from files in memory (a tree on disk would bring the real clock in by its
timestamps); everything else goes through the product's own use cases.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Final

from dmsync.core.events import CommitsAdded, RefChanged
from dmsync.core.ids import DotId, Kind, ObjectId
from dmsync.core.objects import ROOT_ENTRY, Commit, Entry, EntryKind, Layout
from dmsync.core.pages import directory_entries, write_directory
from dmsync.engine.store import Store
from dmsync.storage.pack_writer import PackWriter

DOT_NAME: Final = "app"
SUBDOT: Final = b"__default__"
FILES: Final = tuple(b"file%d" % number for number in range(5))
LARGE_BYTES: Final = 60_000


@dataclass(frozen=True)
class Contents:
    """A directory in memory."""

    directories: tuple[str, ...]
    files: tuple[tuple[str, bytes], ...]

    @classmethod
    def of(cls, home: str) -> "Contents":
        directories, files = [], []
        for path, below, names in os.walk(home):
            below.sort()
            directories.append(os.path.relpath(path, home))
            for name in sorted(names):
                with open(os.path.join(path, name), "rb") as file:
                    found = file.read()
                files.append((os.path.relpath(os.path.join(path, name), home), found))
        return cls(tuple(directories), tuple(files))

    def write(self, home: str) -> None:
        for path in self.directories:
            os.makedirs(os.path.normpath(os.path.join(home, path)), 0o700, exist_ok=True)
        for path, content in self.files:
            with open(os.path.join(home, path), "wb") as file:
                file.write(content)
            os.chmod(os.path.join(home, path), 0o600)


@dataclass(frozen=True)
class Stage:
    """The stores of all machines before anything happens."""

    dot: DotId
    contents: dict[str, Contents]


def commit_files(
    store: Store, dot: DotId, branch: str, random: Random, op_id: bytes
) -> tuple[ObjectId | None, ObjectId]:
    """Change some files of a branch and commit them; returns the old tip and the new one."""
    objects = store.objects(dot)
    with store.dot_locked(dot):
        row = store.catalog.branch(dot, branch)
        old = None if row is None else row.target
        with objects.writer() as writer:
            root = _changed(store, dot, writer, old, random)
            now_ns, _ = store.clock()
            author = store.settings.author
            parents = () if old is None else (old,)
            value = Commit(root, parents, author, author, now_ns, 0, f"change {random.random()}")
            new = writer.put(Kind.COMMIT, value.to_bytes())
            writer.seal()
        with store.transaction("commit", op_id) as tx:
            tx.append(CommitsAdded(dot, (new,)))
            kind = "commit" if old else "create"
            tx.append(RefChanged(dot, f"branch/{branch}", old, new, kind, "change"))
    return old, new


def _changed(
    store: Store, dot: DotId, writer: PackWriter, old: ObjectId | None, random: Random
) -> Entry:
    entries = {entry.name: entry for entry in _files(store, dot, old)}
    for name in random.sample(FILES, random.randint(1, 2)):
        size = random.choice((0, 20, 900, 3_000))
        if not random.randrange(12):
            size = LARGE_BYTES
        before = entries.get(name)
        entries[name] = _file(writer, name, random.randbytes(size), before)
    tree = write_directory(writer, sorted(entries.values(), key=lambda entry: entry.name))
    subdot = Entry(SUBDOT, EntryKind.DIRECTORY, 0o755, tree=tree)
    return Entry(b"", EntryKind.DIRECTORY, 0o755, tree=write_directory(writer, [subdot]))


def _file(writer: PackWriter, name: bytes, data: bytes, before: Entry | None) -> Entry:
    if not data:
        return Entry(name, EntryKind.FILE, 0o644)
    base = ObjectId(before.content) if before is not None and before.content else None
    chunk = writer.put(Kind.CHUNK, data, base=base)
    return Entry(name, EntryKind.FILE, 0o644, size=len(data), content=chunk, layout=Layout.SINGLE)


def _files(store: Store, dot: DotId, commit: ObjectId | None) -> Iterator[Entry]:
    root = ROOT_ENTRY if commit is None else store.root(dot, commit)
    objects = store.objects(dot)
    for subdot in directory_entries(objects, root.tree):
        yield from directory_entries(objects, subdot.tree)
