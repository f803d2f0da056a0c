"""A session: pumps bytes between a ByteStream and the state machine of dmsync/1.

One task reads, so that heartbeats are answered while the engine works; deadlines and cancellation
end it. Owns no protocol rules: those are in wire.connection.
"""

import asyncio
import time
from collections import deque
from collections.abc import Iterable
from typing import Final, TypeVar

from dmsync.engine.ports import ByteStream
from dmsync.errors import DmError, NetworkError, ProtocolError
from dmsync.wire.connection import REQUESTS, Connection, Role
from dmsync.wire.failures import error_from_failure, failure_from_error
from dmsync.wire.frames import FrameType
from dmsync.wire.limits import (
    CONTROL_BYTES_MAX,
    HANDSHAKE_TIMEOUT_S,
    IDLE_TIMEOUT_S,
    INFLIGHT_BYTES_MAX,
    NO_PROGRESS_TIMEOUT_S,
    PING_INTERVAL_S,
    PROGRESS_BYTES_MIN,
    RECORDS_BYTES_MAX,
    REQUESTS_INFLIGHT_MAX,
    WORK_BYTES_PER_S,
    WORK_TIMEOUT_S,
)
from dmsync.wire.messages import (
    Bye,
    Failure,
    Message,
    Ping,
    Plan,
    Pong,
    Records,
    RefsReply,
    Signatures,
)

READ_BYTES: Final = 256 * 1024
WRITE_BYTES: Final = 128 * 1024
"""Most that is written at a time; a peer that does not take it within NO_PROGRESS_TIMEOUT_S is
given up."""
PIECE_BYTES_FIRST: Final = 16 * 1024
PIECE_BYTES_MIN: Final = 4 * 1024
QUICK_WRITE_S: Final = 0.5
SLOW_WRITE_S: Final = 5.0
QUEUED_BYTES_MAX: Final = INFLIGHT_BYTES_MAX + RECORDS_BYTES_MAX + 8 * CONTROL_BYTES_MAX
"""What a peer within its credits can have made us hold: records, and pages of a plan."""
QUEUED_MESSAGES_MAX: Final = 65_536
WATCH_S: Final = 0.2
STEP_S: Final = 0.02
"""Work between two looks at the network."""
DRAIN_S: Final = 5.0
"""How long the sender of ERROR reads what is still under way, so that the ERROR arrives."""

_MessageT = TypeVar("_MessageT")


async def in_steps(work: Iterable[object]) -> None:
    """Run a generator of small steps, letting the session breathe in between."""
    began = time.monotonic()
    for _ in work:
        if time.monotonic() - began > STEP_S:
            await asyncio.sleep(0)
            began = time.monotonic()


class Session:
    """One conversation over one stream. Use `async with`; leaving it closes the stream."""

    def __init__(self, stream: ByteStream, role: Role) -> None:
        self.connection = Connection(role)
        self.bytes_sent = 0
        self.bytes_received = 0
        self.round_trips = 0
        self._stream = stream
        self._messages: deque[Message] = deque()
        self._queued_bytes = 0
        self._queued_requests = 0
        self._arrived = asyncio.Event()
        self._failure: DmError | None = None
        self._ended = False
        self._draining = False
        self._peer_gave_up = False
        self._sent_since_reply = False
        self._write_lock = asyncio.Lock()
        self._writing: asyncio.Timeout | None = None
        self._piece_bytes = PIECE_BYTES_FIRST
        self._last_heard_s = self._last_sent_s = time.monotonic()
        self._began_s = self._last_progress_s = self._last_heard_s
        self._waiting_since_s: float | None = None
        """Since when the engine waits for the peer; None while it does not."""
        self.work_bytes = 0
        """How much the peer has to prove: it gets more time for more."""
        self._buffered_before = 0
        self._is_pong_due = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> "Session":
        self._tasks = [asyncio.create_task(self._read()), asyncio.create_task(self._watch())]
        return self

    async def __aexit__(self, kind: object, error: object, trace: object) -> None:
        try:
            if isinstance(error, DmError):
                await self._say_failure(error)
            elif error is None:
                await self._say_last(Bye())
        finally:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            await self._stream.aclose()

    # --- sending ------------------------------------------------------------------------------

    async def send(self, *messages: Message) -> None:
        """Send messages in one write; waits while the transport is full.

        Raises:
            The peer's ERROR when it sent one, else NetworkError.
        """
        for message in messages:
            self.connection.send(message)
        self._sent_since_reply = self._sent_since_reply or any(
            message.TYPE not in _NOT_QUESTIONS for message in messages
        )
        try:
            await self._flush()
        except NetworkError as exc:
            raise await self._cause_of(exc) from exc

    async def _flush(self) -> None:
        async with self._write_lock:
            if self._is_pong_due:
                self._is_pong_due = False
                self.connection.send(Pong())
            data = self.connection.data_to_send()
            start = 0
            while start < len(data):
                part = data[start : start + self._piece_bytes]
                await self._write(part)
                start += len(part)

    async def _write(self, data: bytes) -> None:
        """Pass some bytes on. Raises NetworkError, also when the peer does not take them."""
        began_s = self._last_sent_s = time.monotonic()
        self.bytes_sent += len(data)
        try:
            async with asyncio.timeout(NO_PROGRESS_TIMEOUT_S) as self._writing:
                await self._stream.write(data)
        except TimeoutError as exc:
            taken = f"the peer took nothing for {NO_PROGRESS_TIMEOUT_S:.0f} s"
            raise self._failure or NetworkError(taken) from exc
        finally:
            self._writing = None
        self._suit_piece(len(data), time.monotonic() - began_s)

    def _suit_piece(self, size: int, took_s: float) -> None:
        """Only whole pieces count as taken: a slow peer gets smaller ones."""
        if took_s > SLOW_WRITE_S:
            self._piece_bytes = max(PIECE_BYTES_MIN, self._piece_bytes // 2)
        elif took_s < QUICK_WRITE_S and size == self._piece_bytes:
            self._piece_bytes = min(WRITE_BYTES, self._piece_bytes * 2)

    async def _cause_of(self, broken: NetworkError) -> DmError:
        """A peer that gives up says why before it closes: prefer its words to a broken pipe."""
        deadline = time.monotonic() + 1.0
        while self._failure is None and not self._ended and time.monotonic() < deadline:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), 0.1)
            except TimeoutError:
                continue
        return self._failure or broken

    async def _say_last(self, message: Message) -> None:
        """Send a last word to a peer that may be gone."""
        self.connection.send(message)
        try:
            async with asyncio.timeout(DRAIN_S):
                await self._flush()
        except (NetworkError, TimeoutError):
            return

    async def _say_failure(self, error: DmError) -> None:
        """Tell the peer, unless it is gone, gave up itself, or is no dm server at all."""
        is_stranger = self.connection.role is Role.CLIENT and self.connection.peer is None
        if self._ended or self._peer_gave_up or is_stranger:
            return
        self._draining = True
        await self._say_last(failure_from_error(error))
        deadline = time.monotonic() + DRAIN_S
        while not self._ended and time.monotonic() < deadline:
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                return

    # --- receiving ----------------------------------------------------------------------------

    async def receive(self) -> Message:
        """The next message. Raises the peer's ERROR as its typed error, NetworkError at the end."""
        await self._wait_for_message()
        self._raise_if_over()
        message = self._take_queued()
        if self._sent_since_reply and message.TYPE not in _NOT_ANSWERS:
            self._sent_since_reply = False
            self.round_trips += 1
        return message

    def check_peer(self) -> None:
        """Raise why there is nobody any more to work for. May be called in any thread."""
        if self._failure is not None or self._ended:
            raise self._failure or NetworkError("the peer left before it was answered")

    @property
    def has_arrived(self) -> bool:
        """Is there something that `receive` gives or raises at once?"""
        return bool(self._messages) or self._failure is not None or self._ended

    async def arrival(self, timeout_s: float) -> bool:
        """Wait until `has_arrived`, or somebody calls `wake`; False when that takes too long."""
        if not self.has_arrived:
            self._arrived.clear()
            try:
                async with asyncio.timeout(timeout_s):
                    await self._arrived.wait()
            except TimeoutError:
                return False
        return True

    def wake(self) -> None:
        """End an `arrival` that is waited for: something else happened."""
        self._arrived.set()

    async def next_request(self) -> Message | None:
        """The next message, or None when the peer said BYE or closed between requests."""
        await self._wait_for_message()
        if not self._messages and self._failure is None:
            return None
        return await self.receive()

    async def _wait_for_message(self) -> None:
        """Wait until `has_arrived`; this is the time that the peer may not waste."""
        self._waiting_since_s = time.monotonic()
        try:
            while not self.has_arrived:
                self._arrived.clear()
                await self._arrived.wait()
        finally:
            self._waiting_since_s = None

    async def expect(self, kind: type[_MessageT]) -> _MessageT:
        """The next message, which must be a `kind`. Raises ProtocolError."""
        message = await self.receive()
        if not isinstance(message, kind):
            raise ProtocolError(f"{message.TYPE.name} where {kind.__name__} was due")
        return message

    def poll(self) -> Message | None:
        """The next message if one is there. Raises the peer's ERROR."""
        if self._messages:
            return self._take_queued()
        self._raise_if_over()
        return None

    def _take_queued(self) -> Message:
        message = self._messages.popleft()
        self._queued_bytes -= _weight(message)
        self._queued_requests -= message.TYPE in REQUESTS
        return message

    def _raise_if_over(self) -> None:
        """Raise why nothing comes any more, when all that came was taken."""
        if self._messages:
            return
        if self._failure is not None:
            raise self._failure
        if self._ended:
            raise NetworkError("the peer closed the connection before it was done")

    async def _read(self) -> None:
        try:
            while True:
                data = await self._stream.read(READ_BYTES)
                if not data:
                    self._at_end()
                    return
                self._last_heard_s = time.monotonic()
                self.bytes_received += len(data)
                if self._take_or_fail(data):
                    return
        except DmError as exc:
            self._fail(exc)
        finally:
            self._ended = True
            self._arrived.set()

    def _at_end(self) -> None:
        try:
            self.connection.receive_end()
        except DmError as exc:
            self._fail(exc)

    def _take_or_fail(self, data: bytes) -> bool:
        """True when the conversation is over. After a broken rule, reads on to the end, so that
        the peer is told which."""
        if self._draining:
            return False
        try:
            return self._take(data)
        except DmError as exc:
            self._draining = True
            self._fail(exc)
            return False

    def _take(self, data: bytes) -> bool:
        """Queue the messages that `data` completes; True when the conversation is over."""
        for message in self.connection.receive(data):
            match message:
                case Ping():
                    self._is_pong_due = True  # one for all that came since the last
                case Pong():
                    pass
                case Failure():
                    self._peer_gave_up = True
                    self._fail(error_from_failure(message))
                    return True
                case Bye():
                    return True
                case _:
                    self._messages.append(message)
                    self._queued_bytes += _weight(message)
                    self._queued_requests += message.TYPE in REQUESTS
                    self._progressed()
        if self.connection.buffered_bytes >= self._buffered_before + PROGRESS_BYTES_MIN:
            self._progressed()
        if self._queued_bytes > QUEUED_BYTES_MAX or len(self._messages) > QUEUED_MESSAGES_MAX:
            raise ProtocolError("the peer sent more than its credits")
        if self._queued_requests > REQUESTS_INFLIGHT_MAX:
            raise ProtocolError(f"more than {REQUESTS_INFLIGHT_MAX} requests at once")
        self._arrived.set()
        return False

    def _progressed(self) -> None:
        """The peer sent something besides heartbeats."""
        self._last_progress_s = time.monotonic()
        self._buffered_before = self.connection.buffered_bytes

    def _fail(self, error: DmError) -> None:
        if self._failure is None:
            self._failure = error
        self._arrived.set()
        if self._writing is not None:  # nobody is to wait for a peer that is given up
            self._writing.reschedule(asyncio.get_running_loop().time())

    async def _watch(self) -> None:
        """Deadlines, heartbeats, and sending the answers to the peer's heartbeats."""
        now = time.monotonic()
        while not self._ended:
            before = now
            await asyncio.sleep(WATCH_S)
            now = time.monotonic()
            # our own long step is not the peer's silence
            self._last_heard_s += max(0.0, now - before - 5 * WATCH_S)
            if (failure := self._lack_of_progress(now)) is not None:
                return self._fail(failure)
            if self.connection.peer is None and now - self._began_s > HANDSHAKE_TIMEOUT_S:
                return self._fail(NetworkError(f"no answer within {HANDSHAKE_TIMEOUT_S:.0f} s"))
            if now - self._last_heard_s > IDLE_TIMEOUT_S:
                return self._fail(NetworkError(f"the peer was silent for {IDLE_TIMEOUT_S:.0f} s"))
            if now - self._last_sent_s > PING_INTERVAL_S and self.connection.peer is not None:
                self.connection.send(Ping())
            if self._write_lock.locked():
                continue
            try:
                await self._flush()
            except NetworkError as exc:
                self._fail(exc)
                return None
        return None

    def _lack_of_progress(self, now_s: float) -> DmError | None:
        """What to say to a peer that we wait for and that sends heartbeats alone."""
        if self._waiting_since_s is None:
            return None
        most_s = NO_PROGRESS_TIMEOUT_S
        if self.connection.peer_may_work:
            most_s = WORK_TIMEOUT_S + self.work_bytes / WORK_BYTES_PER_S
        if now_s - max(self._waiting_since_s, self._last_progress_s) <= most_s:
            return None
        return NetworkError(f"the peer sent nothing but heartbeats for {most_s:.0f} s")


_NOT_QUESTIONS: Final = frozenset({FrameType.ACK, FrameType.PONG, FrameType.PING})
_NOT_ANSWERS: Final = frozenset({FrameType.ACK, FrameType.PONG})


def _weight(message: Message) -> int:
    """About how many bytes a queued message holds."""
    match message:
        case Records(joined=joined):
            return len(joined)
        case Plan(keys=keys):
            return len(keys) + len(keys) // 8
        case RefsReply(refs=refs):
            return 400 * len(refs)
        case Signatures(signatures=signatures):
            return sum(len(signature) for _, signature in signatures)
        case _:
            return 64
