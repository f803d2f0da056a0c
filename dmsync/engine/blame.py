"""The last commit that changed each path: one walk through history for all of them."""

from collections.abc import Iterator
from dataclasses import dataclass
from heapq import heappop, heappush

from dmsync.core.ids import DotId, ObjectId
from dmsync.core.objects import Entry, EntryKind
from dmsync.core.pages import directory_entries, find_path, walk_tree
from dmsync.engine.commit_info import CommitInfo, CommitReader
from dmsync.engine.differences import joined
from dmsync.engine.path_history import PathComparison, PathSet
from dmsync.engine.revision_lookup import resolve_revision
from dmsync.engine.store import Store
from dmsync.errors import ContentAbsent, PathNotFound
from dmsync.storage.catalog import DotRow


@dataclass(frozen=True)
class BlamedPath:
    """One path and the last commit that changed it.

    With `is_boundary` it may have changed before: the content of that commit's parents is not
    here.
    """

    path: bytes
    commit: CommitInfo
    is_boundary: bool = False


def blame(
    store: Store,
    dot: DotRow,
    revision: str = "HEAD",
    paths: tuple[bytes, ...] = (b"",),
    *,
    recursive: bool = False,
) -> list[BlamedPath]:
    """Who changed last, as of `revision`: of a directory each of its entries, of a file itself.

    With `recursive`, all files below a directory instead of its entries. Sorted by path, each
    once. A merge changed a path when the path differs from all its parents'.

    Raises:
        PathNotFound, ContentAbsent; as `resolve_revision`.
    """
    tip = resolve_revision(store, dot, revision)
    commits = CommitReader(store, dot.dot)
    if commits.is_hollow(tip):
        raise ContentAbsent(
            f"the content of commit {tip.hex()[:12]} is not here, only its record",
            id=tip.hex(),
        )
    root = commits.commit(tip).root
    asked = PathSet()
    for path in paths:
        for found in _paths_at(store, dot.dot, root, path, revision, recursive=recursive):
            asked.add(found)
    search = _Search(store, dot.dot, commits)
    return sorted(search.run(tip, asked), key=lambda blamed: blamed.path)


def _paths_at(
    store: Store, dot: DotId, root: Entry, path: bytes, revision: str, *, recursive: bool
) -> Iterator[bytes]:
    objects = store.objects(dot)
    entry = find_path(objects, root, path)
    if entry is None:
        told = path.decode("utf-8", "backslashreplace")
        raise PathNotFound(f"no path {told} in {revision}", hint=f"dm ls {revision}:")
    if entry.kind is not EntryKind.DIRECTORY:
        yield path
    elif recursive:
        for below, found in walk_tree(objects, entry):
            if found.kind is not EntryKind.DIRECTORY:
                yield joined(path, below)
    else:
        for found in directory_entries(objects, entry.tree):
            yield joined(path, found.name)


class _Search:
    """Hands paths down from commit to parent as long as they are equal there."""

    def __init__(self, store: Store, dot: DotId, commits: CommitReader) -> None:
        self._graph = store.catalog.graph(dot)
        self._commits = commits
        self._comparison = PathComparison(store, dot, commits)

    def run(self, tip: ObjectId, paths: PathSet) -> Iterator[BlamedPath]:
        """Each of `paths`, which all exist at `tip`, once."""
        waiting = {tip: paths}
        # In descending generation: what reaches a commit has done so before its turn.
        queue = [(-self._graph.generation(tip), tip)]
        while queue:
            _, commit = heappop(queue)
            left = waiting.pop(commit)
            is_boundary = False
            for parent in self._graph.parents(commit):
                changed = self._comparison.changed(parent, commit, left)
                if changed is None:
                    is_boundary = True
                    continue
                equal, left = left, PathSet(changed)
                for path in changed:
                    equal.remove(path)
                if not equal:
                    continue
                if parent in waiting:
                    for path in equal:
                        waiting[parent].add(path)
                else:
                    waiting[parent] = equal
                    heappush(queue, (-self._graph.generation(parent), parent))
                if not left:
                    break
            for path in left:
                yield BlamedPath(path, self._commits.info(commit), is_boundary)
