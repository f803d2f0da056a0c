"""A bundle file as the other side of a fetch: answers a client as a server would.

Sans-I/O rules come from wire.connection, content from engine.bundles; nothing is trusted more
than what a server sends. Memory follows what the client has not acknowledged.
"""

import asyncio
from collections.abc import Callable, Iterator

from dmsync.core.ids import ObjectId
from dmsync.engine.bundles import Bundle, count_records
from dmsync.errors import ProtocolError
from dmsync.wire.connection import Connection, Role
from dmsync.wire.messages import (
    Ack,
    Done,
    Fetch,
    Hello,
    Known,
    KnownQuery,
    KnownReply,
    Message,
    Plan,
    PlanReply,
    Records,
    Refs,
    RefsReply,
    Signatures,
)
from dmsync.wire.windows import SendWindow


class BundleStream:
    """A ByteStream (engine.ports) to an open bundle.

    `greeting`: this side's own HELLO. `is_below(commit)`: does the bundle build on it?
    """

    def __init__(
        self, bundle: Bundle, greeting: Hello, is_below: Callable[[ObjectId], bool]
    ) -> None:
        self._bundle = bundle
        self._connection = Connection(Role.SERVER)
        self._connection.send(greeting)
        self._is_below = is_below
        self._out = memoryview(b"")
        self._window = SendWindow()
        self._sending: Iterator[Plan | Records | Signatures] | None = None
        self._next: Plan | Records | Signatures | None = None
        self._fetch: Fetch | None = None
        self._pages_unanswered = 0
        self._changed = asyncio.Event()
        self._is_closed = False

    async def read(self, n: int) -> bytes:
        """The server's next bytes; waits while the client has too much unacknowledged."""
        while True:
            if not self._out:
                self._advance()
                self._out = memoryview(self._connection.data_to_send())
            if self._out:
                data, self._out = bytes(self._out[:n]), self._out[n:]
                return data
            if self._is_closed or not self._connection.is_open:
                return b""
            self._changed.clear()
            await self._changed.wait()

    async def write(self, data: bytes) -> None:
        """Take the client's bytes. Raises ProtocolError when they break the rules."""
        for message in self._connection.receive(data):
            self._take(message)
        self._changed.set()

    async def aclose(self) -> None:
        self._is_closed = True
        self._changed.set()

    def _take(self, message: Message) -> None:
        match message:
            case Refs():
                self._connection.send(self._refs(message))
            case KnownQuery(ids=ids):
                states = (
                    Known.CONTENT if self._is_below(commit) else Known.ABSENT for commit in ids
                )
                self._connection.send(KnownReply(bytes(states)))
            case Fetch():
                self._fetch, self._sending = message, self._bundle.messages()
            case Ack():
                self._window.acknowledged(message)
            case PlanReply():
                self._pages_unanswered -= 1  # the file is here: all of it is handed over
            case _:
                pass

    def _refs(self, ask: Refs) -> RefsReply:
        header = self._bundle.header
        is_here = ask.dot in (None, header.dot)
        return RefsReply(
            header.dot if is_here else None,
            header.namespace,
            header.name,
            header.namespace,
            "bundle",
            header.head,
            header.seq,
            header.epoch,
            header.refs if is_here else (),
            header.hollow_count > 0,
        )

    def _advance(self) -> None:
        """Queue the next message of the transfer, if there is one and the window has room."""
        if self._sending is None:
            return
        if self._next is None:
            self._next = next(self._sending, None)
        if self._pages_unanswered and not isinstance(self._next, Plan):
            return
        match self._next:
            case None:
                self._finish()
            case Records(joined=joined):
                if not self._window.has_room(len(joined)):
                    return
                self._window.sent(len(joined), count_records(joined))
                self._connection.send(self._next)
            case Signatures(signatures=signatures):
                assert self._fetch is not None, "what is sent was asked for"
                self._connection.send(Signatures(self._fetch.transfer, signatures))
            case plan:
                self._pages_unanswered += 1
                self._connection.send(plan)
        self._next = None

    def _finish(self) -> None:
        if self._fetch is None:
            raise ProtocolError("nothing was asked for")
        records = self._window.records_sent
        self._connection.send(Done(self._fetch.transfer, records, records, 0))
        self._sending = None
