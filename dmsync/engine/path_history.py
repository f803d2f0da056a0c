"""Which commits changed given paths: trees are compared only where those paths lead.

Equal subtrees are never entered, so that a step costs what changed on the way to the paths, not
the size of the tree.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

from dmsync.core.graph import GraphView
from dmsync.core.ids import DotId, ObjectId
from dmsync.core.objects import Entry, EntryKind
from dmsync.core.pages import DIRECTORY, PageReader, differing_items, read_page
from dmsync.engine.commit_info import CommitReader
from dmsync.engine.differences import compared, joined
from dmsync.engine.store import Store
from dmsync.errors import ContentAbsent, ObjectMissing, UsageError

_DIRECTORIES_KEPT = 256


def tree_path(text: bytes) -> bytes:
    """A path as users write it (`__default__/logs/`, `.` for the whole tree), in the form that
    trees use: no slash at either end.

    Raises:
        UsageError: it holds `.`, `..` or an empty name.
    """
    path = text.strip(b"/")
    if path in (b"", b"."):
        return b""
    if any(name in (b"", b".", b"..") for name in path.split(b"/")):
        raise UsageError(
            f"bad path {text.decode('utf-8', 'backslashreplace')}: it goes from the dot's root, "
            "without . and .. in it",
            hint="for example __default__/stock.txt; dm ls HEAD: lists the subdots",
        )
    return path


class PathSet:
    """Paths as a tree of names, each standing for all that is below it."""

    def __init__(self, paths: Iterable[bytes] = ()) -> None:
        self.is_member = False
        self.below: dict[bytes, PathSet] = {}
        for path in paths:
            self.add(path)

    def __bool__(self) -> bool:
        return self.is_member or bool(self.below)

    def __iter__(self) -> Iterator[bytes]:
        """The paths that were added, in no order."""
        pending = [(b"", self)]
        while pending:
            path, node = pending.pop()
            if node.is_member:
                yield path
            pending.extend((joined(path, name), below) for name, below in node.below.items())

    def add(self, path: bytes) -> None:
        node = self
        for name in _names(path):
            node = node.below.setdefault(name, PathSet())
        node.is_member = True

    def remove(self, path: bytes) -> None:
        """Take out a path that was added."""
        way = [(b"", self)]
        for name in _names(path):
            way.append((name, way[-1][1].below[name]))
        way[-1][1].is_member = False
        for (_, above), (name, node) in zip(way[-2::-1], way[:0:-1], strict=True):
            if node:
                break
            del above.below[name]

    def covers(self, path: bytes) -> bool:
        """Whether `path` is one of the paths, or below one."""
        node: PathSet | None = self
        for name in _names(path):
            if node is None or node.is_member:
                break
            node = node.below.get(name)
        return node is not None and node.is_member


def _names(path: bytes) -> list[bytes]:
    return path.split(b"/") if path else []


class DirectoryReader:
    """Compares directories. Short ones read lately are not read again: along history every
    directory is the new side once and the old side once."""

    def __init__(self, reader: PageReader) -> None:
        self._reader = reader
        self._short = lru_cache(maxsize=_DIRECTORIES_KEPT)(self._read_short)

    def differing(
        self, old: Entry | None, new: Entry | None
    ) -> Iterator[tuple[bytes, Entry | None, Entry | None]]:
        """The names whose entries differ, in no order; what is no directory holds no names."""
        old_tree, new_tree = _directory(old), _directory(new)
        if old_tree == new_tree:
            return
        was, now = self._short(old_tree), self._short(new_tree)
        if was is None or now is None:
            old_items, new_items, _ = differing_items(self._reader, old_tree, new_tree, DIRECTORY)
            was = {entry.name: entry for entry in old_items}
            now = {entry.name: entry for entry in new_items}
        for name in was.keys() | now.keys():
            if was.get(name) != now.get(name):
                yield name, was.get(name), now.get(name)

    def _read_short(self, tree: ObjectId | None) -> dict[bytes, Entry] | None:
        """The entries of a directory of one page; None for a longer one."""
        if tree is None:
            return {}
        page = read_page(self._reader, tree, DIRECTORY)
        return {entry.name: entry for entry in page.items} if page.level == 0 else None


def _directory(entry: Entry | None) -> ObjectId | None:
    is_directory = entry is not None and entry.kind is EntryKind.DIRECTORY
    return entry.tree if entry is not None and is_directory else None


def changed_paths(
    directories: DirectoryReader, old: Entry | None, new: Entry | None, wanted: PathSet
) -> Iterator[bytes]:
    """The wanted paths at or below which `old` and `new` differ, in no order.

    A directory's time alone is no difference. Raises ObjectMissing, BadObject.
    """
    pending = [(b"", old, new, wanted)]
    while pending:
        path, was, now, below = pending.pop()
        if below.is_member and _is_changed(directories, path, was, now):
            yield path
        if below.below:
            for name, before, after in directories.differing(was, now):
                if name in below.below:
                    pending.append((joined(path, name), before, after, below.below[name]))


def _is_changed(
    directories: DirectoryReader, path: bytes, old: Entry | None, new: Entry | None
) -> bool:
    pending = [(path, old, new)]
    while pending:
        at, was, now = pending.pop()
        if compared(at, was, now) is not None:
            return True
        pending.extend((at, before, after) for _, before, after in directories.differing(was, now))
    return False


class PathComparison:
    """Compares commits of one dot at a set of paths.

    `unknown_count` counts comparisons that were not possible: content is not here.
    """

    def __init__(self, store: Store, dot: DotId, commits: CommitReader) -> None:
        self._directories = DirectoryReader(store.objects(dot))
        self._commits = commits
        self._is_partial = store.catalog.scope(dot) is not None
        self.unknown_count = 0

    def changed(
        self, parent: ObjectId | None, commit: ObjectId, wanted: PathSet
    ) -> set[bytes] | None:
        """The wanted paths that `commit` changed against `parent` (None: against nothing); None
        when that is not known."""
        try:
            return set(self._changes(parent, commit, wanted))
        except ContentAbsent:
            self.unknown_count += 1
            return None

    def differs(self, parent: ObjectId | None, commit: ObjectId, wanted: PathSet) -> bool:
        """Whether any wanted path changed, or may have."""
        try:
            return next(self._changes(parent, commit, wanted), None) is not None
        except ContentAbsent:
            self.unknown_count += 1
            return True

    def _changes(
        self, parent: ObjectId | None, commit: ObjectId, wanted: PathSet
    ) -> Iterator[bytes]:
        old = None if parent is None else self._commits.commit(parent).root
        new = self._commits.commit(commit).root
        if old == new:
            return
        for needed in (parent, commit):
            if needed is not None and self._commits.is_hollow(needed):
                raise ContentAbsent("only the record of this commit is here", id=needed.hex())
        try:
            yield from changed_paths(self._directories, old, new, wanted)
        except ObjectMissing as exc:
            if not self._is_partial:
                raise
            raise ContentAbsent("outside of what this clone keeps") from exc


class PathSimplifier:
    """Walks history as git does for paths by default: what led to the state of the paths now.

    A commit is listed when the paths differ from its parent's. A merge that took the paths
    unchanged from one of its parents is not, and only that parent is followed; `is_relevant` says
    which parents may be chosen so (those that are not excluded from the walk). Without paths all
    commits are listed and all parents followed, but for `first_parent`.
    """

    def __init__(
        self,
        graph: GraphView,
        comparison: PathComparison,
        wanted: PathSet,
        *,
        is_relevant: Callable[[ObjectId], bool],
        first_parent: bool,
    ) -> None:
        self._graph = graph
        self._comparison = comparison
        self._wanted = wanted
        self._is_relevant = is_relevant
        self._first_parent = first_parent

    def visit(self, commit: ObjectId) -> tuple[bool, tuple[ObjectId, ...]]:
        """(is it listed, which parents to follow)."""
        parents = self._graph.parents(commit)
        if self._first_parent:
            parents = parents[:1]
        if not self._wanted:
            return True, parents
        if not parents:
            return self._comparison.differs(None, commit, self._wanted), ()
        has_relevant = has_changed = False
        for parent in parents:
            differs = self._comparison.differs(parent, commit, self._wanted)
            if not self._is_relevant(parent):
                has_changed |= differs
                continue
            if not differs:
                return False, (parent,)
            has_relevant = True
        return has_relevant or has_changed, parents
