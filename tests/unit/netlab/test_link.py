"""The link that other tests measure with: it counts, delays, holds a rate and cuts where told."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support.processes import wait_until
from tools.netlab.link import Link

MEGABYTE = 1024 * 1024


class Sink:
    """A server that reads each connection to its end and answers with how much came."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.received: list[int] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._count, args=(connection,), daemon=True).start()

    def _count(self, connection: socket.socket) -> None:
        total = 0
        with connection:
            try:
                while chunk := connection.recv(MEGABYTE):
                    total += len(chunk)
            except ConnectionError:
                pass
            self.received.append(total)
            try:
                connection.sendall(b"%d" % total)
            except OSError:
                pass

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def sink() -> Iterator[Sink]:
    made = Sink()
    yield made
    made.close()


@contextmanager
def connected(link: Link) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", link.port)) as client:
        client.settimeout(30)
        yield client


def exchange(link: Link, data: bytes) -> bytes:
    """Send everything, say so, and read the answer."""
    with connected(link) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return client.recv(100)


def test_everything_passes_both_ways_and_is_counted(sink: Sink) -> None:
    with Link(sink.port) as link:
        assert exchange(link, bytes(5 * MEGABYTE)) == b"%d" % (5 * MEGABYTE)
        assert exchange(link, b"abc") == b"3"
        assert (link.bytes_up, link.bytes_down) == (5 * MEGABYTE + 3, 7 + 1)
        assert link.connections == 2


def test_delay_holds_every_byte_back_on_its_way(sink: Sink) -> None:
    with Link(sink.port, delay_ms=60) as link:
        began_s = time.monotonic()
        assert exchange(link, b"abc") == b"3"
        assert time.monotonic() - began_s >= 4 * 0.06, "opening, there and back"


def test_a_rate_is_never_exceeded(sink: Sink) -> None:
    with Link(sink.port, rate_bits_per_s=16e6) as link:
        began_s = time.monotonic()
        exchange(link, bytes(MEGABYTE))
        assert time.monotonic() - began_s >= 0.9 * MEGABYTE * 8 / 16e6


def test_a_cut_falls_on_the_byte_and_later_connections_pass(sink: Sink) -> None:
    with Link(sink.port, cut_after_bytes=100_001) as link:
        with connected(link) as client:
            with pytest.raises(OSError):
                while True:
                    client.sendall(bytes(MEGABYTE))
        wait_until(lambda: sink.received, what="the server to see the end")
        assert sink.received == [100_001]
        assert link.bytes_total == 100_001
        assert exchange(link, b"abc") == b"3"


def test_a_cut_at_a_time(sink: Sink) -> None:
    with Link(sink.port, cut_after_s=0.2) as link, connected(link) as client:
        assert client.recv(1) == b"", "broken although nobody sent a byte"


def test_an_action_runs_exactly_at_its_byte_and_the_rest_follows(sink: Sink) -> None:
    seen: list[int] = []
    with Link(sink.port) as link:
        link.at_total(1000, lambda: seen.append(link.bytes_total))
        assert link.armed
        assert exchange(link, bytes(5000)) == b"5000"
        assert seen == [1000]
        assert not link.armed


def test_cutting_by_hand(sink: Sink) -> None:
    with Link(sink.port) as link, connected(link) as client:
        client.sendall(b"abc")
        wait_until(lambda: link.bytes_up == 3, what="three bytes to pass")
        link.cut()
        assert client.recv(1) == b""
