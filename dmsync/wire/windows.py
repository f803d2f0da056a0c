"""Flow control of a record stream: what is under way, what is durable (WIRE.md 5)."""

from dataclasses import dataclass

from dmsync.errors import ProtocolError
from dmsync.wire.limits import ACK_BYTES, ACK_INTERVAL_S, INFLIGHT_BYTES_MAX
from dmsync.wire.messages import Ack


@dataclass(slots=True)
class SendWindow:
    """The sender's side: never more than `credits` record bytes without a durable ACK."""

    credits: int = INFLIGHT_BYTES_MAX
    bytes_sent: int = 0
    records_sent: int = 0
    bytes_durable: int = 0
    records_durable: int = 0

    def has_room(self, frame_bytes: int) -> bool:
        """A frame larger than the whole window may go when nothing else is under way."""
        under_way = self.bytes_sent - self.bytes_durable
        return under_way == 0 or under_way + frame_bytes <= self.credits

    def sent(self, frame_bytes: int, records_count: int) -> None:
        self.bytes_sent += frame_bytes
        self.records_sent += records_count

    def acknowledged(self, ack: Ack) -> None:
        """Take an ACK. Raises ProtocolError when it goes back or names what was never sent."""
        if not (
            self.bytes_durable <= ack.bytes_durable <= self.bytes_sent
            and self.records_durable <= ack.records_durable <= self.records_sent
        ):
            raise ProtocolError("ACK of records that were not sent")
        self.bytes_durable = ack.bytes_durable
        self.records_durable = ack.records_durable
        self.credits = min(ack.credits, INFLIGHT_BYTES_MAX) or self.credits


@dataclass(slots=True)
class ReceiveWindow:
    """The receiver's side: when to make what came durable and acknowledge it."""

    bytes_received: int = 0
    records_received: int = 0
    bytes_durable: int = 0
    records_durable: int = 0
    last_ack_s: float = 0.0

    def received(self, frame_bytes: int, records_count: int) -> None:
        """Raises ProtocolError when more is under way than the sender has credits for."""
        self.bytes_received += frame_bytes
        self.records_received += records_count
        if self.waiting_bytes > INFLIGHT_BYTES_MAX:
            raise ProtocolError("the peer sent more than its credits")

    @property
    def waiting_bytes(self) -> int:
        """Received and not said to be durable."""
        return self.bytes_received - self.bytes_durable

    def is_ack_due(self, now_s: float) -> bool:
        waiting = self.waiting_bytes
        return waiting >= ACK_BYTES or (waiting > 0 and now_s - self.last_ack_s >= ACK_INTERVAL_S)

    def mark(self) -> tuple[int, int]:
        """Bytes and records received so far: what a sync that begins now makes durable."""
        return self.bytes_received, self.records_received

    def made_durable(self, now_s: float, mark: tuple[int, int] | None = None) -> Ack:
        """Everything up to `mark` (default: received so far) is durable: the ACK that says so."""
        self.bytes_durable, self.records_durable = mark or self.mark()
        self.last_ack_s = now_s
        return Ack(self.records_durable, self.bytes_durable, INFLIGHT_BYTES_MAX)
