"""One side of a dmsync/1 session, without I/O: bytes in, checked messages out, bytes to send.

Never reads, writes or waits. Which message may come when is a table (WIRE.md 4); anything else
is a ProtocolError, after which the connection is closed for good.
"""

from collections import deque
from enum import Enum, auto
from typing import Final

from dmsync.errors import DmError, NotADmServer, ProtocolError, VersionMismatch
from dmsync.wire.failures import printable
from dmsync.wire.frames import FrameBuffer, FrameType, encode_frame
from dmsync.wire.limits import BANNER_BYTES_MAX, MAGIC, VERSION_MAX, VERSION_MIN
from dmsync.wire.messages import (
    Bye,
    Failure,
    Hello,
    Message,
    Plan,
    frame_from_message,
    message_from_frame,
)


class Role(Enum):
    CLIENT = auto()
    SERVER = auto()


class State(Enum):
    """Where a server is in the conversation; CLOSED for both roles."""

    OPENING = auto()
    IDLE = auto()
    DOT_NAMED = auto()
    PLANNING = auto()
    RECEIVING = auto()
    SENDING = auto()
    CLOSED = auto()


SERVER_TRANSITIONS: Final = {
    (State.OPENING, FrameType.HELLO): State.IDLE,
    (State.IDLE, FrameType.REFS): State.DOT_NAMED,
    (State.IDLE, FrameType.LIST_DOTS): State.IDLE,
    (State.DOT_NAMED, FrameType.REFS): State.DOT_NAMED,
    (State.DOT_NAMED, FrameType.LIST_DOTS): State.DOT_NAMED,
    (State.DOT_NAMED, FrameType.KNOWN): State.DOT_NAMED,
    (State.DOT_NAMED, FrameType.SHARE): State.DOT_NAMED,
    (State.DOT_NAMED, FrameType.PUSH): State.PLANNING,
    (State.DOT_NAMED, FrameType.FETCH): State.SENDING,
    # ACKs of a FETCH that the server finished sending are still under way
    (State.DOT_NAMED, FrameType.ACK): State.DOT_NAMED,
    (State.PLANNING, FrameType.PLAN): State.PLANNING,
    (State.RECEIVING, FrameType.RECORDS): State.RECEIVING,
    (State.RECEIVING, FrameType.SIGNATURES): State.RECEIVING,
    (State.RECEIVING, FrameType.UPDATE): State.DOT_NAMED,
    (State.SENDING, FrameType.PLAN_REPLY): State.SENDING,
    (State.SENDING, FrameType.ACK): State.SENDING,
}
"""What a server accepts from a client. The last PLAN page moves PLANNING to RECEIVING; sending
DONE moves SENDING to DOT_NAMED. PING, PONG, ERROR and BYE are accepted in every open state."""

REPLIES: Final = {
    FrameType.HELLO: FrameType.HELLO,
    FrameType.REFS: FrameType.REFS_REPLY,
    FrameType.LIST_DOTS: FrameType.DOTS_REPLY,
    FrameType.KNOWN: FrameType.KNOWN_REPLY,
    FrameType.SHARE: FrameType.SHARED,
    FrameType.PUSH: FrameType.READY,
    FrameType.UPDATE: FrameType.RESULT,
    FrameType.FETCH: FrameType.DONE,
}
"""What answers what. A client accepts only the answer to its oldest open request; a PLAN without
EAGER is answered by PLAN_REPLY, and what precedes an answer is in BEFORE_REPLY."""

REQUESTS: Final = frozenset(REPLIES) - {FrameType.HELLO}

BEFORE_REPLY: Final = {
    FrameType.DONE: frozenset({FrameType.PLAN, FrameType.RECORDS, FrameType.SIGNATURES}),
    FrameType.RESULT: frozenset({FrameType.ACK}),
    FrameType.PLAN_REPLY: frozenset({FrameType.ACK}),
}

_ALWAYS: Final = frozenset({FrameType.PING, FrameType.PONG, FrameType.ERROR, FrameType.BYE})


class Connection:
    """The state of one side. `receive` and `send` are the only ways in."""

    def __init__(self, role: Role) -> None:
        self.role = role
        self.state = State.OPENING
        self.peer: Hello | None = None
        self._frames = FrameBuffer()
        self._banner = bytearray()
        self._magic_seen = role is Role.SERVER
        self._expected: deque[FrameType] = deque()
        self._receiving_push = False
        self._plan_began = self._plan_ended = False
        self._out: list[bytes] = [MAGIC] if role is Role.SERVER else []

    # --- in ---------------------------------------------------------------------------------

    def receive(self, data: bytes) -> list[Message]:
        """Feed bytes from the peer; return the messages they complete (maybe none), in order.

        Raises:
            NotADmServer: (client) no MAGIC within 64 KiB.
            VersionMismatch: no common version.
            ProtocolError: anything else the peer may not send.
        """
        if self.state is State.CLOSED:
            return []
        try:
            return self._receive(data)
        except DmError:
            self.state = State.CLOSED
            raise

    def _receive(self, data: bytes) -> list[Message]:
        if not self._magic_seen:
            rest = self._skip_banner(data)
            if rest is None:
                return []
            data = rest
        self._frames.feed(data)
        messages: list[Message] = []
        for frame in self._frames.frames():
            message = message_from_frame(frame)
            self._admit(message)
            messages.append(message)
            if self.state is State.CLOSED:
                break
        return messages

    def receive_end(self) -> None:
        """The peer's stream ended. Raises NotADmServer (client) when MAGIC never came."""
        self.state = State.CLOSED
        if not self._magic_seen:
            raise self._no_server("the connection ended before a dm server answered")

    def _skip_banner(self, data: bytes) -> bytes | None:
        self._banner += data
        at = self._banner.find(MAGIC)
        if at > BANNER_BYTES_MAX or (at < 0 and len(self._banner) > BANNER_BYTES_MAX + len(MAGIC)):
            raise self._no_server("no dm server within 64 KiB of output")
        if at < 0:
            return None
        rest = bytes(self._banner[at + len(MAGIC) :])
        self._banner.clear()
        self._magic_seen = True
        return rest

    def _no_server(self, reason: str) -> NotADmServer:
        seen = printable(self._banner[:400].decode("utf-8", "backslashreplace")).strip()
        hint = "is dm installed there?"
        if "not found" in seen or "No such file" in seen or not seen:
            hint = (
                "dm may be outside the PATH of non-interactive logins there: "
                "set remote.NAME.dm-command to its full path"
            )
        message = f"{reason}; it said: {seen!r}" if seen else reason
        return NotADmServer(message, hint=hint, seen=seen)

    def _admit(self, message: Message) -> None:
        """Check that `message` may come now and move on. Raises ProtocolError."""
        kind = message.TYPE
        if self.state is State.OPENING and kind not in (FrameType.HELLO, FrameType.ERROR):
            raise ProtocolError(f"{kind.name} before HELLO")
        if isinstance(message, (Bye, Failure)):
            self.state = State.CLOSED
        elif isinstance(message, Hello):
            self._greet(message)
        elif kind in _ALWAYS:
            return
        elif self.role is Role.SERVER:
            self._admit_request(message)
        else:
            self._admit_reply(message)

    def _greet(self, hello: Hello) -> None:
        if self.state is not State.OPENING:
            raise ProtocolError("HELLO twice")
        if hello.version_min > VERSION_MAX or hello.version_max < VERSION_MIN:
            theirs = f"{hello.version_min}..{hello.version_max}"
            raise VersionMismatch(
                f"the peer speaks dmsync/{theirs}, this side {VERSION_MIN}..{VERSION_MAX}",
                hint="upgrade the older of the two",
                agent=hello.agent,
            )
        self.peer = hello
        self.state = State.IDLE
        self._frames.handshaken = True
        if self.role is Role.CLIENT:
            self._take_expected(FrameType.HELLO)

    def _admit_request(self, message: Message) -> None:
        following = SERVER_TRANSITIONS.get((self.state, message.TYPE))
        if following is None:
            raise ProtocolError(f"{message.TYPE.name} in state {self.state.name.lower()}")
        self.state = following
        if isinstance(message, Plan) and message.last:
            self.state = State.RECEIVING

    def _admit_reply(self, message: Message) -> None:
        kind = message.TYPE
        awaited = self._expected[0] if self._expected else None
        if kind is FrameType.ACK and self._receiving_push:
            return
        if awaited is not None and kind in BEFORE_REPLY.get(awaited, ()):
            self._admit_stream(message)
        elif kind is awaited:
            if getattr(message, "last", True):
                self._take_expected(kind)
            if kind is FrameType.DONE and not self._plan_ended:
                raise ProtocolError("DONE before the plan ended")
        else:
            raise ProtocolError(f"{kind.name} answers nothing that was asked")

    def _admit_stream(self, message: Message) -> None:
        if isinstance(message, Plan):
            if self._plan_ended:
                raise ProtocolError("PLAN after the plan ended")
            self._plan_began = True
            self._plan_ended = message.last
        elif not self._plan_ended:
            raise ProtocolError(f"{message.TYPE.name} before the plan ended")

    def _take_expected(self, kind: FrameType) -> None:
        if not self._expected or self._expected.popleft() is not kind:
            raise ProtocolError(f"{kind.name} answers nothing that was asked")
        if kind is FrameType.RESULT:
            self._receiving_push = False

    # --- out --------------------------------------------------------------------------------

    def send(self, message: Message) -> None:
        """Queue one of our own messages."""
        kind = message.TYPE
        if self.role is Role.CLIENT:
            if kind in REPLIES:
                self._expected.append(REPLIES[kind])
            if isinstance(message, Plan) and not message.eager:
                self._expected.append(FrameType.PLAN_REPLY)
            if kind is FrameType.PUSH:
                self._receiving_push = True
            if kind is FrameType.FETCH:
                self._plan_began = self._plan_ended = False
        elif kind is FrameType.DONE and self.state is State.SENDING:
            self.state = State.DOT_NAMED
        self._out.append(encode_frame(frame_from_message(message)))

    def data_to_send(self) -> bytes:
        """Everything queued, once."""
        data = self._out[0] if len(self._out) == 1 else b"".join(self._out)
        self._out.clear()
        return data

    @property
    def buffered_bytes(self) -> int:
        """What came of a frame that is not complete yet."""
        return self._frames.buffered_bytes

    @property
    def peer_may_work(self) -> bool:
        """May the peer, by where the conversation is, have long work of its own to do before it
        sends anything but heartbeats (WIRE.md 7)?"""
        if self.role is Role.SERVER:
            return self.state in (State.IDLE, State.DOT_NAMED)
        awaited = self._expected[0] if self._expected else None
        if awaited is FrameType.DONE:
            return not self._plan_began
        return awaited in (FrameType.READY, FrameType.RESULT)

    @property
    def is_open(self) -> bool:
        return self.state is not State.CLOSED
