"""A TCP link on the loopback with delay, rate, cuts and byte counts, run by a process of its own.

    with Link(server_port, delay_ms=50, rate_bits_per_s=20e6) as link:
        ...  # let the client connect to 127.0.0.1:link.port
        print(link.bytes_up, link.bytes_down)

`delay_ms` is one way (a round trip takes twice that, and opening a connection one round trip more);
`rate_bits_per_s` holds each direction alone; `cut_after_bytes` and `cut_after_s` break all open
connections once, at that many bytes of both directions together or that long after the start;
later connections are accepted. `bytes_up` is what clients sent, `bytes_down` what the server sent,
over all connections, read at any time. `close()` ends the process.
"""

import mmap
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from tools.netlab.relay import COUNTER_BYTES, COUNTERS, Command, Notice

RELAY_PROGRAM = Path(__file__).with_name("relay.py")
ANSWER_TIMEOUT_S = 20.0


class Link:
    """Relays every connection made to `port` to `target_port`; both on 127.0.0.1."""

    def __init__(
        self,
        target_port: int,
        *,
        delay_ms: float = 0.0,
        rate_bits_per_s: float | None = None,
        cut_after_bytes: int | None = None,
        cut_after_s: float | None = None,
    ) -> None:
        self.target_port = target_port
        self._action: Callable[[], None] | None = None
        self._answered = threading.Event()
        self._control, far_end = socket.socketpair()
        with far_end, tempfile.TemporaryFile() as counters:
            counters.truncate(COUNTER_BYTES)
            self._counters = mmap.mmap(counters.fileno(), COUNTER_BYTES)
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-S", "-E", str(RELAY_PROGRAM)),
                    *("--target-port", str(target_port)),
                    *("--delay-s", str(delay_ms / 1e3)),
                    *("--rate-bytes-per-s", str((rate_bits_per_s or 0) / 8)),
                    *("--cut-after-bytes", str(cut_after_bytes or 0)),
                    *("--cut-after-s", str(cut_after_s or 0)),
                    *("--counters-fd", str(counters.fileno())),
                    *("--control-fd", str(far_end.fileno())),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=(counters.fileno(), far_end.fileno()),
                start_new_session=True,  # Ctrl-C is for whoever made the link
            )
        self._notices = self._control.makefile("r")
        first = self._notices.readline().split()
        if not first or first[0] != Notice.LISTENING:
            raise RuntimeError(f"the relay did not start: {first}")
        self.port = int(first[1])
        threading.Thread(target=self._listen, daemon=True).start()

    def __enter__(self) -> "Link":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # --- what passed ----------------------------------------------------------------------------

    @property
    def bytes_up(self) -> int:
        """Bytes from clients that were passed on."""
        return self._count(0)

    @property
    def bytes_down(self) -> int:
        """Bytes from the server that were passed on."""
        return self._count(1)

    @property
    def connections(self) -> int:
        """Connections accepted so far."""
        return self._count(2)

    @property
    def bytes_total(self) -> int:
        """Bytes passed on in both directions."""
        return self.bytes_up + self.bytes_down

    def _count(self, number: int) -> int:
        return int(COUNTERS.unpack_from(self._counters)[number])

    # --- what happens to it ---------------------------------------------------------------------

    def at_total(self, total_bytes: int, action: Callable[[], None]) -> None:
        """Run `action` once, in a thread of its own, when `bytes_total` reaches `total_bytes`; no
        byte passes meanwhile. Replaces an earlier one."""
        self._action = action
        self._tell(Command.STOP_AT, total_bytes)

    @property
    def armed(self) -> bool:
        """Whether an action waits that has not run yet."""
        return self._action is not None

    def cut(self) -> None:
        """Break every open connection, as a dead network would; new ones are accepted."""
        self._tell(Command.CUT)

    def close(self) -> None:
        """Accept no more and break everything."""
        try:
            self._control.shutdown(socket.SHUT_RDWR)  # the relay ends with its control
        except OSError:
            pass  # it has ended already
        self._process.wait(ANSWER_TIMEOUT_S)

    def _tell(self, command: Command, argument: int = 0) -> None:
        self._answered.clear()
        self._control.sendall(f"{command} {argument}\n".encode())
        if not self._answered.wait(ANSWER_TIMEOUT_S):
            raise RuntimeError(f"the relay does not answer {command}")

    def _listen(self) -> None:
        try:
            for line in self._notices:
                if line.strip() == Notice.DONE:
                    self._answered.set()
                elif line.strip() == Notice.STOPPED:
                    self._run_action()
        except (OSError, ValueError):
            return  # closed

    def _run_action(self) -> None:
        action, self._action = self._action, None
        try:
            if action is not None:
                action()
        finally:
            self._control.sendall(f"{Command.GO_ON} 0\n".encode())
