"""Commits as people read them: the record, the place in the graph, the refs that point at it."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

from dmsync.core.ids import DotId, ObjectId
from dmsync.core.objects import Commit, commit_from_bytes
from dmsync.engine.revision_lookup import commit_at_ref
from dmsync.engine.store import Store
from dmsync.errors import RevisionNotFound
from dmsync.storage.catalog_rows import CommitRow

_RECORDS_KEPT = 4096


@dataclass(frozen=True)
class CommitInfo:
    """A commit as `dm log` and `dm show` tell it. Times in nanoseconds UTC, offset in minutes.

    `refs` names branches and tags that point at it. Of a hollow commit only the record is here.
    """

    id: ObjectId
    parents: tuple[ObjectId, ...]
    author: str
    committer: str
    time_ns: int
    offset_minutes: int
    message: str
    metadata: tuple[tuple[str, str], ...]
    generation: int
    capture: tuple[str, str, int] | None
    refs: tuple[str, ...]
    is_hollow: bool = False


class CommitReader:
    """The commits of one dot; a record read lately is not read again."""

    def __init__(self, store: Store, dot: DotId) -> None:
        self._store = store
        self._dot = dot
        self._read = lru_cache(maxsize=_RECORDS_KEPT)(self._read_record)

    def commit(self, oid: ObjectId) -> Commit:
        """Raises RevisionNotFound."""
        return self._read(oid)[1]

    def is_hollow(self, oid: ObjectId) -> bool:
        """Raises RevisionNotFound."""
        return self._read(oid)[0].is_hollow

    def info(self, oid: ObjectId) -> CommitInfo:
        """Raises RevisionNotFound."""
        row, commit = self._read(oid)
        return CommitInfo(
            id=oid,
            parents=commit.parents,
            author=commit.author,
            committer=commit.committer,
            time_ns=commit.time_ns,
            offset_minutes=commit.offset_minutes,
            message=commit.message,
            metadata=commit.metadata,
            generation=row.generation,
            capture=row.capture,
            refs=self._refs.get(oid, ()),
            is_hollow=row.is_hollow,
        )

    def _read_record(self, oid: ObjectId) -> tuple[CommitRow, Commit]:
        row = self._store.catalog.commit(self._dot, oid)
        if row is None:
            raise RevisionNotFound(f"no commit {oid.hex()[:12]} in this dot")
        return row, commit_from_bytes(row.payload, trusted=True)

    @cached_property
    def _refs(self) -> dict[ObjectId, tuple[str, ...]]:
        found: dict[ObjectId, tuple[str, ...]] = {}
        for row in self._store.catalog.refs(self._dot):
            commit = commit_at_ref(self._store, self._dot, row.name)
            if commit is not None:
                shown = row.name.removeprefix("branch/").removeprefix("remote/")
                found[commit] = (*found.get(commit, ()), shown)
        return found
