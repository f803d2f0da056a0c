"""An open store: the one object that use cases are called with."""

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import ClassVar

from dmsync.core.events import UNIQUE_ID_BYTES
from dmsync.core.ids import DotId, Kind, ObjectId
from dmsync.core.objects import ROOT_ENTRY, Commit, Entry, commit_from_bytes
from dmsync.engine.settings import EngineSettings
from dmsync.errors import ContentAbsent, ObjectMissing, RevisionNotFound, StorageFailed, StorageFull
from dmsync.storage.catalog import Catalog, CommitRow, Transaction
from dmsync.storage.layout import Layout, create_store, open_store
from dmsync.storage.locks import FileLock
from dmsync.storage.object_store import ObjectStore


class Store:
    """Layout, catalog and objects of one DM_HOME.

    Holds the store lock shared for as long as it is open, so that migration (which takes it
    exclusively) never runs beside a command. gc excludes commands dot by dot, by their holds.
    """

    is_past: ClassVar[bool] = False
    """Shows the store as it was (engine/past): it has no working trees and cannot be changed."""

    def __init__(self, layout: Layout, settings: EngineSettings) -> None:
        self.layout = layout
        self.settings = settings
        self._lock = FileLock(
            layout.lock_file, shared=True, wait_s=settings.lock_wait_s, what="the store"
        )
        self._objects: dict[DotId, ObjectStore] = {}
        self._objects_lock = threading.Lock()
        self._lock.acquire()
        try:
            self.catalog = Catalog.open(
                layout,
                self.read_commit,
                read_tag=self.read_tag,
                lock_wait_s=settings.lock_wait_s,
            )
        except BaseException:
            self._lock.release()
            raise

    @classmethod
    def open(cls, home: str, settings: EngineSettings, *, create: bool = False) -> "Store":
        """Open the store at `home`; with `create`, make one when there is none.

        Raises:
            StoreNotFound, FormatUnsupported, Busy (migration under way).
        """
        if create and not os.path.lexists(Layout(home).format_file):
            create_store(
                home,
                cluster_id=os.urandom(UNIQUE_ID_BYTES),
                epoch=int.from_bytes(os.urandom(6), "big"),
                op_id=os.urandom(UNIQUE_ID_BYTES),
                time_ns=time.time_ns(),
                actor=settings.actor,
            )
        return cls(open_store(home, sudo_user=settings.sudo_user), settings)

    @property
    def home(self) -> str:
        return self.layout.home

    def objects(self, dot: DotId) -> ObjectStore:
        """The objects of one dot; opened once, whichever threads ask, and held against gc as the
        settings say. Raises Busy: gc is sweeping the dot."""
        objects = self._opened(dot)
        hold, holding = objects.hold, self.settings.holding
        if holding != "never" and not hold.is_held and hold.refusal is None:
            with self._objects_lock:
                if not hold.is_held:
                    # gc writes down what it removes while it holds the dot alone
                    wait_s = 0.0 if self.catalog.is_in_transaction else self.settings.lock_wait_s
                    hold.acquire_or_go_on(wait_s if holding == "wait" else None)
        return objects

    def _opened(self, dot: DotId) -> ObjectStore:
        """As `objects`, not held: a replay reads commits while it holds the log's lock."""
        with self._objects_lock:
            if dot not in self._objects:
                directory = self._objects_dir(dot)
                self._objects[dot] = ObjectStore(directory, self.settings.lock_wait_s)
                self._objects[dot].is_partial = lambda: self.scope(dot) is not None
            return self._objects[dot]

    def scope(self, dot: DotId) -> frozenset[bytes] | None:
        """Names of the subdots whose content is kept here; None for all."""
        subdots = self.catalog.scope(dot)
        return None if subdots is None else frozenset(os.fsencode(name) for name in subdots)

    def _objects_dir(self, dot: DotId) -> str:
        self._make_dot_dirs(dot)
        return self.layout.dot_dir(dot)

    def _make_dot_dirs(self, dot: DotId) -> None:
        try:
            self.layout.make_dot_dirs(dot)
        except (StorageFull, StorageFailed):
            # A backup may lack the empty directories: reading needs none of them.
            if not os.path.isdir(self.layout.packs_dir(dot)):
                raise

    def read_commit(self, dot: DotId, commit: ObjectId) -> bytes:
        """A commit for the replay of the log, which also tells of dots that lie in the trash."""
        if dot in self._objects or os.path.isdir(self.layout.dot_dir(dot)):
            try:
                return self._opened(dot).read_commit(commit)
            except ObjectMissing:
                pass  # deleted, and the directory made again since
        return self._read_trashed_commit(dot, commit)

    def read_tag(self, dot: DotId, tag: ObjectId) -> bytes:
        """An annotated tag's bytes, verified. Raises ObjectMissing, HashMismatch, Corruption."""
        return self._opened(dot).read(Kind.TAG, tag)

    def _read_trashed_commit(self, dot: DotId, commit: ObjectId) -> bytes:
        prefix = f"{dot.hex()}-"
        for name in os.listdir(self.layout.trash_dir):
            if name.startswith(prefix):
                with ObjectStore(self.layout.trashed_dot_dir(name)) as objects:
                    if objects.has(Kind.COMMIT, commit):
                        return objects.read_commit(commit)
        raise ObjectMissing(f"commit {commit.hex()[:12]} is not in this dot", id=commit.hex())

    def commit(self, dot: DotId, commit: ObjectId) -> Commit:
        """A commit that the graph knows, hollow or not. Raises RevisionNotFound."""
        return commit_from_bytes(self._commit_row(dot, commit).payload, trusted=True)

    def _commit_row(self, dot: DotId, commit: ObjectId) -> CommitRow:
        row = self.catalog.commit(dot, commit)
        if row is None:
            raise RevisionNotFound(f"no commit {commit.hex()[:12]} in this dot")
        return row

    def root(self, dot: DotId, commit: ObjectId | None) -> Entry:
        """The root of a commit's tree; the empty root for an unborn branch.

        Whoever reads content gets it from here, before anything is changed.

        Raises:
            RevisionNotFound. ContentAbsent: only the record of the commit is here.
        """
        if commit is None:
            return ROOT_ENTRY
        row = self._commit_row(dot, commit)
        if row.is_hollow:
            raise ContentAbsent.of_commit(commit)
        return commit_from_bytes(row.payload, trusted=True).root

    @contextmanager
    def transaction(self, command: str, op_id: bytes | None = None) -> Iterator[Transaction]:
        """One atomic, durable change of the catalog (see Catalog.transaction)."""
        with self.catalog.transaction(command, self.settings.actor, op_id=op_id) as tx:
            yield tx

    @contextmanager
    def dot_locked(self, dot: DotId) -> Iterator[None]:
        """Exclusive use of a dot's trees: capture, checkout, reset, merge. Raises Busy."""
        with FileLock(
            self.layout.dot_lock_file(dot), wait_s=self.settings.lock_wait_s, what="the dot"
        ):
            yield

    def say(self, message: str) -> None:
        """Tell the user something that happened on the way (never a result)."""
        self.settings.say(message)

    @staticmethod
    def clock() -> tuple[int, int]:
        """Now, in nanoseconds since 1970 UTC, and the local offset in minutes east of UTC."""
        now_ns = time.time_ns()
        return now_ns, time.localtime(now_ns // 1_000_000_000).tm_gmtoff // 60

    def forget_objects(self, dot: DotId) -> None:
        """Close a dot's objects (it was deleted or moved)."""
        objects = self._objects.pop(dot, None)
        if objects is not None:
            objects.close()

    def close(self) -> None:
        for objects in self._objects.values():
            objects.close()
        self._objects.clear()
        self.catalog.close()
        self._lock.release()

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()
