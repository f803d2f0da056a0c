"""The record of a transfer in the log: begun when something moves, finished in every case."""

import os

from dmsync.core.events import Event, TransferFinished, TransferStarted
from dmsync.core.ids import DotId
from dmsync.engine.ports import SyncStore
from dmsync.errors import DmError
from dmsync.storage.catalog import TransferRow
from dmsync.storage.durable import storage_errors
from dmsync.storage.layout import Layout
from dmsync.storage.locks import ProofOfLife, is_alive, remove_if_dead

RUNNING = "running"
CUT = "cut"
Summary = tuple[tuple[str, str | int | None], ...]


class TransferLog:
    """One push or fetch as seen by one side. A run that moves nothing leaves no trace."""

    def __init__(
        self, store: SyncStore, *, direction: str, remote: str, command: str, actor: str
    ) -> None:
        self.id = os.urandom(16)
        self.command = command
        self.actor = actor
        self.dot: DotId | None = None
        self.branch: str | None = None
        self.has_moved = False
        """Set by the owner once records are under way."""
        self._store = store
        self._direction = direction
        self._remote = remote
        self._is_started = False
        self._is_finished = False
        self._layout = store.catalog.layout
        self._proof = ProofOfLife(self._layout.transfer_lock_file(self.id))

    def start_events(self) -> list[Event]:
        """TransferStarted, unless it is recorded already."""
        if self._is_started:
            return []
        return [TransferStarted(self.id, self._direction, self._remote, self.dot, self.branch)]

    def finish_events(self, status: str, summary: Summary) -> list[Event]:
        return [*self.start_events(), TransferFinished(self.id, status, summary)]

    def record_start(self) -> None:
        """Record that a large transfer begins. Durable. Raises Busy, StorageFull."""
        self.has_moved = True
        _sweep(self._layout)
        self._proof.acquire()
        self._append(self.start_events())
        self._is_started = True

    def finished(self) -> None:
        """The owner's transaction has recorded the end."""
        self._is_started = self._is_finished = True
        self.close()

    def close(self) -> None:
        """This side does no more: a transfer that has no end in the log by now was cut."""
        self._proof.release()

    def record_failure(self, error: DmError) -> None:
        """Record that it failed, when it had begun. Raises Busy, StorageFull."""
        if self._is_finished or not (self.has_moved or self._is_started):
            return
        summary = (("code", error.code), ("message", error.message[:4096]))
        catalog = self._store.catalog
        with catalog.transaction(self.command, self.actor) as tx:
            # An append whose fsync failed may be in the log all the same; then it is known by now.
            row = catalog.transfer(self.id)
            self._is_started = row is not None
            if row is None or not row.status:
                for event in self.finish_events("failed", summary):
                    tx.append(event)
        self.finished()

    def _append(self, events: list[Event]) -> None:
        with self._store.catalog.transaction(self.command, self.actor) as tx:
            for event in events:
                tx.append(event)


def transfer_status(layout: Layout, row: TransferRow) -> str:
    """How a transfer ended; RUNNING, or CUT when whoever did it is gone."""
    if row.status:
        return row.status
    return RUNNING if is_alive(layout.transfer_lock_file(row.transfer_id)) else CUT


def _sweep(layout: Layout) -> None:
    """Make the directory of proofs, and remove those of processes that were killed."""
    with storage_errors(f"making {layout.transfers_dir}"):
        os.makedirs(layout.transfers_dir, 0o700, exist_ok=True)
        names = os.listdir(layout.transfers_dir)
    for name in names:
        remove_if_dead(os.path.join(layout.transfers_dir, name))
