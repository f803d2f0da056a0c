"""The byte stream to a peer as transports give it: a ByteStream that can say what went wrong."""

from typing import Final, Protocol

from dmsync.engine.ports import ByteStream

DIAGNOSTICS_BYTES_MAX: Final = 4096
WRITE_BYTES: Final = 256 * 1024
"""Largest single write: measured best with 128 KiB SSH packets."""
CLOSE_TIMEOUT_S: Final = 5.0
"""How long closing waits for a peer that does not take what was sent, or does not end."""


class PeerStream(ByteStream, Protocol):
    """A stream to one peer."""

    async def write_eof(self) -> None:
        """Say that nothing more is sent; reading goes on. Raises NetworkError."""
        ...

    def diagnostics(self) -> str:
        """What the peer wrote to its stderr and how it exited: printable text, at most 4 KiB."""
        ...


class Tail:
    """The last bytes of a peer's stderr, and its exit status; bounded, safe to print."""

    def __init__(self) -> None:
        self._kept = b""
        self.exit_status: int | None = None
        self.exit_signal = ""

    def feed(self, text: bytes) -> None:
        """Add what the peer wrote."""
        self._kept = (self._kept + text[-DIAGNOSTICS_BYTES_MAX:])[-DIAGNOSTICS_BYTES_MAX:]

    def text(self) -> str:
        """Printable text of one or more lines: no control, no bidirectional characters."""
        decoded = self._kept.decode("utf-8", "replace").replace("\r\n", "\n")
        return "".join(
            c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in decoded
        ).strip()

    def describe(self) -> str:
        """The text and how the peer ended; at most 4 KiB in UTF-8."""
        ending = ""
        if self.exit_signal:
            ending = f"killed by signal {self.exit_signal}"
        elif self.exit_status:
            ending = f"exit status {self.exit_status}"
        room = DIAGNOSTICS_BYTES_MAX - len(ending) - 1
        text = self.text().encode()[-room:].decode("utf-8", "ignore")
        return "\n".join(part for part in (text, ending) if part)
