"""Commits with small trees, written straight into a real store: any graph, no working tree."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from dmsync.core.events import CommitsAdded, CommitsThinned, RefChanged
from dmsync.core.ids import Kind, ObjectId
from dmsync.core.objects import ROOT_ENTRY, Commit, Entry, EntryKind, Layout
from dmsync.core.pages import write_directory
from dmsync.engine.store import Store
from dmsync.storage.catalog import DotRow
from dmsync.storage.pack_writer import PackWriter

Files = dict[bytes, bytes]


@dataclass(frozen=True)
class Planned:
    """A commit to be made: `parents` are positions in the list that it stands in."""

    parents: tuple[int, ...] = ()
    files: Files = field(default_factory=dict)
    message: str = "m"
    author: str = "Ada <ada@example.org>"
    time_s: int = 0
    metadata: tuple[tuple[str, str], ...] = ()
    directory_time_ns: int = 0
    """Of all its directories: alone it is no change."""


def record(store: Store, dot: DotRow, plan: Sequence[Planned]) -> list[ObjectId]:
    """Make all commits, in one operation."""
    ids: list[ObjectId] = []
    with store.objects(dot.dot).writer() as writer:
        for planned in plan:
            commit = Commit(
                root=_root(writer, planned),
                parents=tuple(ids[parent] for parent in planned.parents),
                author=planned.author,
                committer=planned.author,
                time_ns=planned.time_s * 10**9,
                offset_minutes=0,
                message=planned.message,
                metadata=planned.metadata,
            )
            ids.append(writer.put(Kind.COMMIT, commit.to_bytes()))
        writer.seal()
    add_commits(store, dot, ids)
    return ids


def add_commits(store: Store, dot: DotRow, commits: Sequence[ObjectId]) -> None:
    """Record that these commits, parents first, are complete."""
    with store.transaction("test") as tx:
        tx.append(CommitsAdded(dot.dot, tuple(commits)))


def point(store: Store, dot: DotRow, ref: str, target: ObjectId) -> None:
    """Make or move a ref of this full name."""
    row = store.catalog.ref(dot.dot, ref)
    with store.transaction("test") as tx:
        old = None if row is None else row.target
        tx.append(RefChanged(dot.dot, ref, old, target, "create", "by the test"))


def thin(store: Store, dot: DotRow, *commits: ObjectId) -> None:
    """Make commits hollow."""
    with store.transaction("test") as tx:
        tx.append(CommitsThinned(dot.dot, commits, "by the test"))


def _root(writer: PackWriter, planned: Planned) -> Entry:
    tree = _directory(writer, planned.files, planned.directory_time_ns)
    return Entry(b"", EntryKind.DIRECTORY, ROOT_ENTRY.mode, tree=tree)


def _directory(writer: PackWriter, files: Files, time_ns: int) -> ObjectId | None:
    below: dict[bytes, Files] = {}
    entries = []
    for path, content in files.items():
        name, slash, rest = path.partition(b"/")
        if slash:
            below.setdefault(name, {})[rest] = content
        else:
            entries.append(_file(writer, name, content))
    for name, inside in below.items():
        tree = _directory(writer, inside, time_ns)
        entries.append(Entry(name, EntryKind.DIRECTORY, 0o755, mtime_ns=time_ns, tree=tree))
    return write_directory(writer, sorted(entries, key=lambda entry: entry.name))


def _file(writer: PackWriter, name: bytes, content: bytes) -> Entry:
    if not content:
        return Entry(name, EntryKind.FILE, 0o644)
    chunk = writer.put(Kind.CHUNK, content)
    return Entry(
        name, EntryKind.FILE, 0o644, size=len(content), content=chunk, layout=Layout.SINGLE
    )
