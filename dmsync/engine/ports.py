"""What the use cases of synchronising need from outside: a stream, a store, access, trees."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from dmsync.core.events import Event
from dmsync.core.ids import DotId, ObjectId
from dmsync.errors import DotIdClash
from dmsync.storage.catalog import Catalog
from dmsync.storage.object_store import ObjectStore


class ByteStream(Protocol):
    """An ordered, reliable stream of bytes to one peer. Transports translate their failures."""

    async def read(self, n: int) -> bytes:
        """At least one and at most `n` bytes; b"" at the end. Raises NetworkError."""
        ...

    async def write(self, data: bytes) -> None:
        """Queue `data`; waits while the transport is full. Raises NetworkError."""
        ...

    async def aclose(self) -> None:
        """Send what is queued and close. Never raises for a peer that is gone."""
        ...


class SyncStore(Protocol):
    """The part of an open store that synchronising uses (engine.store.Store is one)."""

    @property
    def catalog(self) -> Catalog: ...

    def objects(self, dot: DotId) -> ObjectStore: ...


Verb = Literal["read", "append", "write", "share", "admin"]


class Access(Protocol):
    """What the peer of a served session may do; given by the transport that knows who it is."""

    @property
    def user(self) -> str: ...

    @property
    def actor(self) -> str:
        """User and key, for the log."""
        ...

    @property
    def login(self) -> str:
        """The name that the transport logged the peer in as; empty where that means nothing."""
        ...

    @property
    def address(self) -> str: ...

    @property
    def default_namespace(self) -> str: ...

    def may(self, namespace: str, name: str, verb: Verb) -> bool:
        """May the peer do `verb` with the dot namespace/name (whether or not it exists)?"""
        ...


def _never_dirty(store: Any, dot: DotId, branch: str) -> None:
    return None


def _no_switch(
    store: Any, dot: DotId, branch: str, held: ObjectId | None, commit: ObjectId
) -> Sequence[Event]:
    return ()


def _nothing_to_finish(store: Any, dot: DotId) -> None:
    return None


def _nothing_saved(store: Any, dot: DotId, branch: str) -> ObjectId | None:
    return None


def _unlocked(store: Any, dot: DotId) -> AbstractContextManager[Any]:
    return nullcontext()


def _stays_deleted(store: Any, dot: DotId, namespace: str, name: str, actor: str) -> None:
    raise DotIdClash(
        "Cannot reconcile: this dot was deleted here and is still in the trash", dot=dot.hex()
    )


@dataclass(frozen=True)
class TargetTree:
    """What happens to working trees when refs move. The defaults are for bare dots.

    `refuse_if_dirty(store, dot, branch)` raises WouldLose. `save_dirty(store, dot, branch)` makes
    a durable snapshot commit of uncommitted state on the branch's tip, known to the catalog but
    named by no ref, and returns it (None: clean). `switch_events(store, dot, branch, held, commit)`
    (`held`: what the tree holds) are recorded in the transaction that moves the ref,
    `finish_switches(store, dot)` then does what they announce: a kill between the two leaves a
    tree that is known to be behind. All are called inside `locked(store, dot)`, except the first
    early check. `revive(store, dot, namespace, name, actor)` makes a deleted dot a bare one again
    before it is received anew.
    """

    refuse_if_dirty: Callable[[Any, DotId, str], None] = field(default=_never_dirty)
    save_dirty: Callable[[Any, DotId, str], ObjectId | None] = field(default=_nothing_saved)
    switch_events: Callable[[Any, DotId, str, ObjectId | None, ObjectId], Sequence[Event]] = field(
        default=_no_switch
    )
    finish_switches: Callable[[Any, DotId], None] = field(default=_nothing_to_finish)
    locked: Callable[[Any, DotId], AbstractContextManager[Any]] = field(default=_unlocked)
    revive: Callable[[Any, DotId, str, str, str], None] = field(default=_stays_deleted)
