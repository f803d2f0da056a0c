"""A TCP relay on the loopback that counts, delays and cuts."""

import queue
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType

RELAY_BYTES = 256 * 1024
DELAY_QUEUE_CHUNKS = 64


class Proxy:
    """Relays every connection made to `port` to `target_port`.

    `bytes_up` counts what clients sent, `bytes_down` what the server sent, over all connections.
    `at_total(n, action)` runs `action` once, in the relay's thread, before a byte beyond the n-th
    (both directions together) is passed on. `delay_s` holds each chunk back, one way.
    """

    def __init__(self, target_port: int, *, delay_s: float = 0.0) -> None:
        self.target_port = target_port
        self.delay_s = delay_s
        self.bytes_up = 0
        self.bytes_down = 0
        self.connections = 0
        self._trigger: tuple[int, Callable[[], None]] | None = None
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self) -> "Proxy":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def bytes_total(self) -> int:
        """Bytes relayed in both directions."""
        return self.bytes_up + self.bytes_down

    def at_total(self, total_bytes: int, action: Callable[[], None]) -> None:
        """Run `action` when `bytes_total` reaches `total_bytes`; replaces an earlier trigger."""
        with self._lock:
            self._trigger = (total_bytes, action)

    @property
    def armed(self) -> bool:
        """Whether a trigger waits that has not run yet."""
        return self._trigger is not None

    def cut(self) -> None:
        """Break every open connection, as a dead network would; new ones are accepted."""
        with self._lock:
            sockets, self._open = self._open, set()
        for one in sockets:
            _close(one)

    def close(self) -> None:
        """Accept no more and break everything."""
        _close(self._listener)
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return  # the listener was closed
            try:
                server = socket.create_connection(("127.0.0.1", self.target_port), timeout=10)
            except OSError:
                _close(client)
                continue
            server.settimeout(None)
            with self._lock:
                self.connections += 1
                self._open.update((client, server))
            link = _Link(client, server)
            for source, target, upward in ((client, server, True), (server, client, False)):
                threading.Thread(
                    target=self._relay, args=(link, source, target, upward), daemon=True
                ).start()

    def _relay(
        self, link: "_Link", source: socket.socket, target: socket.socket, upward: bool
    ) -> None:
        output = _Delayed(target, self.delay_s) if self.delay_s else _Direct(target)
        try:
            while chunk := source.recv(RELAY_BYTES):
                for part, action in self._split_at_trigger(chunk):
                    output.send(part)
                    self._count(len(part), upward)
                    if action is not None:
                        action()
            output.finish()
            broken = False
        except OSError:
            broken = True  # one end is gone: let the other see it
        if link.direction_ended() or broken:
            with self._lock:
                self._open.difference_update(link.ends)
            link.close()

    def _split_at_trigger(self, chunk: bytes) -> list[tuple[bytes, Callable[[], None] | None]]:
        """The chunk, in two where the trigger lies in it, with what to run after the first part."""
        with self._lock:
            if self._trigger is None or self.bytes_total + len(chunk) < self._trigger[0]:
                return [(chunk, None)]
            keep = max(0, self._trigger[0] - self.bytes_total)
            action = self._trigger[1]
            self._trigger = None
        return [(chunk[:keep], action), (chunk[keep:], None)]

    def _count(self, passed_on: int, upward: bool) -> None:
        with self._lock:
            if upward:
                self.bytes_up += passed_on
            else:
                self.bytes_down += passed_on


class _Link:
    """The two sockets of one relayed connection."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.ends = (client, server)
        self._ended = 0
        self._lock = threading.Lock()

    def direction_ended(self) -> bool:
        """Count one direction as finished; True when that was the second."""
        with self._lock:
            self._ended += 1
            return self._ended == 2

    def close(self) -> None:
        for end in self.ends:
            _close(end)


class _Direct:
    """Passes chunks on at once."""

    def __init__(self, target: socket.socket) -> None:
        self._target = target

    def send(self, chunk: bytes) -> None:
        self._target.sendall(chunk)

    def finish(self) -> None:
        self._target.shutdown(socket.SHUT_WR)


class _Delayed:
    """Passes chunks on in order, each `delay_s` after it was given; an empty one means the end."""

    def __init__(self, target: socket.socket, delay_s: float) -> None:
        self._direct = _Direct(target)
        self._delay_s = delay_s
        self._waiting: queue.Queue[tuple[float, bytes]] = queue.Queue(DELAY_QUEUE_CHUNKS)
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def send(self, chunk: bytes) -> None:
        if chunk:
            self._waiting.put((time.monotonic() + self._delay_s, chunk))

    def finish(self) -> None:
        self._waiting.put((time.monotonic() + self._delay_s, b""))
        self._thread.join()

    def _run(self) -> None:
        broken = False
        while True:
            due, chunk = self._waiting.get()
            time.sleep(max(0.0, due - time.monotonic()))  # the delay itself, not a synchronisation
            try:
                if not chunk:
                    self._direct.finish()
                elif not broken:
                    self._direct.send(chunk)
            except OSError:
                broken = True  # go on emptying the queue, so that the relay is never stuck
            if not chunk:
                return


def _close(one: socket.socket) -> None:
    try:
        one.shutdown(socket.SHUT_RDWR)  # wakes a thread that blocks in recv or accept
    except OSError:
        pass
    one.close()
