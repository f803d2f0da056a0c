"""Frames of dmsync/1: u32 payload length, u8 type, u8 flags, payload (protocol/WIRE.md 2)."""

from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from struct import Struct
from typing import Final

from dmsync.errors import ProtocolError
from dmsync.wire.limits import CONTROL_BYTES_MAX, HELLO_BYTES_MAX, RECORDS_BYTES_MAX

HEADER: Final = Struct(">IBB")


class FrameType(IntEnum):
    """Numbers are never reused."""

    HELLO = 1
    REFS = 2
    REFS_REPLY = 3
    LIST_DOTS = 4
    DOTS_REPLY = 5
    KNOWN = 6
    KNOWN_REPLY = 7
    PUSH = 8
    READY = 9
    PLAN = 10
    PLAN_REPLY = 11
    RECORDS = 12
    ACK = 13
    UPDATE = 14
    RESULT = 15
    FETCH = 16
    DONE = 17
    PING = 18
    PONG = 19
    ERROR = 20
    BYE = 21
    SIGNATURES = 22
    SHARE = 23
    SHARED = 24


class Flag(IntFlag):
    NONE = 0
    LAST = 1
    """Last page of a paged message (REFS_REPLY, DOTS_REPLY, PLAN)."""
    EAGER = 2
    """PLAN: the records follow without waiting for PLAN_REPLY, and none is sent."""
    MAY_IGNORE = 128
    """A receiver that does not know the type skips the frame."""


_KNOWN_FLAGS: Final = int(Flag.LAST | Flag.EAGER | Flag.MAY_IGNORE)
_PAYLOAD_BYTES_MAX: Final = {
    FrameType.HELLO: HELLO_BYTES_MAX,
    FrameType.RECORDS: RECORDS_BYTES_MAX,
    FrameType.PING: 8,
    FrameType.PONG: 8,
    FrameType.BYE: 8,
}


@dataclass(frozen=True, slots=True)
class Frame:
    type: FrameType
    flags: Flag
    payload: bytes


def encode_frame(frame: Frame) -> bytes:
    """Bytes of one frame. The payload is our own: its bound is asserted."""
    assert len(frame.payload) <= payload_bytes_max(frame.type), "own frame over its limit"
    return HEADER.pack(len(frame.payload), frame.type, frame.flags) + frame.payload


def payload_bytes_max(frame_type: int) -> int:
    """The largest payload of a type; types not known are control frames."""
    try:
        return _PAYLOAD_BYTES_MAX.get(FrameType(frame_type), CONTROL_BYTES_MAX)
    except ValueError:
        return CONTROL_BYTES_MAX


class FrameBuffer:
    """Cuts a byte stream into frames. A length over its limit is refused before it is buffered."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self.handshaken = False
        """Until the owner sets this, every frame is bounded like HELLO."""

    def feed(self, data: bytes) -> None:
        self._buffer += data

    @property
    def buffered_bytes(self) -> int:
        return len(self._buffer)

    def frames(self) -> Iterator[Frame]:
        """The complete frames received so far, each once.

        Raises:
            ProtocolError: length over the type's limit, unknown flags, unknown type that may not
                be ignored.
        """
        start = 0
        try:
            while len(self._buffer) - start >= HEADER.size:
                length, number, flags = HEADER.unpack_from(self._buffer, start)
                self._check_header(length, number, flags)
                end = start + HEADER.size + length
                if len(self._buffer) < end:
                    break
                payload = bytes(memoryview(self._buffer)[start + HEADER.size : end])
                start = end
                if number in _TYPE_NUMBERS:
                    yield Frame(FrameType(number), Flag(flags), payload)
        finally:
            del self._buffer[:start]

    def _check_header(self, length: int, number: int, flags: int) -> None:
        most = payload_bytes_max(number)
        if not self.handshaken:
            most = min(most, HELLO_BYTES_MAX)
        if length > most:
            raise ProtocolError(f"frame of type {number} announces {length} bytes, at most {most}")
        if flags & ~_KNOWN_FLAGS:
            raise ProtocolError(f"frame of type {number} carries unknown flags {flags}")
        if number not in _TYPE_NUMBERS and not flags & Flag.MAY_IGNORE:
            raise ProtocolError(f"frame type {number} is not known")


_TYPE_NUMBERS: Final = frozenset(int(member) for member in FrameType)
