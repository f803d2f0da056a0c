"""The record of a transfer in the log: begun when something moves, finished in every case."""

from secrets import token_bytes

from dmsync.core.events import Event, TransferFinished, TransferStarted
from dmsync.core.ids import DotId
from dmsync.engine.ports import SyncStore
from dmsync.errors import DmError

Summary = tuple[tuple[str, str | int | None], ...]


class TransferLog:
    """One push or fetch as seen by one side. A run that moves nothing leaves no trace."""

    def __init__(
        self, store: SyncStore, *, direction: str, remote: str, command: str, actor: str
    ) -> None:
        self.id = token_bytes(16)
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
        self._append(self.start_events())
        self._is_started = True

    def finished(self) -> None:
        """The owner's transaction has recorded the end."""
        self._is_started = self._is_finished = True

    def record_failure(self, error: DmError) -> None:
        """Record that it failed, when it had begun. Raises Busy, StorageFull."""
        if self._is_finished or not (self.has_moved or self._is_started):
            return
        summary = (("code", error.code), ("message", error.message[:4096]))
        self._append(self.finish_events("failed", summary))
        self.finished()

    def _append(self, events: list[Event]) -> None:
        with self._store.catalog.transaction(self.command, self.actor) as tx:
            for event in events:
                tx.append(event)
