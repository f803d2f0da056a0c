"""What asyncssh alone carries with this project's settings: bytes through one channel, unread.

    python -m tools.benchmarks.raw_ssh serve KEY         prints its port, discards what comes
    python -m tools.benchmarks.raw_ssh send PORT BYTES   prints the seconds it took

The ceiling for a transfer over the built-in client and the own server.
"""

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from dmsync.transports.ssh_library import TRANSPORT_OPTIONS, asyncssh

MODULE: Final = "tools.benchmarks.raw_ssh"
ROOT: Final = Path(__file__).parents[2]
WRITE_BYTES: Final = 256 * 1024
DONE: Final = b"all"


class _Sink(asyncssh.SSHServerSession[bytes]):
    """Takes everything and says so at the end."""

    def connection_made(self, chan: asyncssh.SSHServerChannel[bytes]) -> None:
        self._channel = chan

    def exec_requested(self, command: str) -> bool:
        return True

    def eof_received(self) -> bool:
        self._channel.write(DONE)
        self._channel.exit(0)
        return True


class _Server(asyncssh.SSHServer):
    def begin_auth(self, username: str) -> bool:
        return False  # nothing is served but a sink, on the loopback

    def session_requested(self) -> _Sink:
        return _Sink()


async def serve(key_file: str) -> None:
    """Print the port and serve for ever."""
    options = {**TRANSPORT_OPTIONS, "server_host_keys": [key_file], "server_factory": _Server}
    listener = await asyncssh.listen("127.0.0.1", 0, **options)
    print(listener.get_port(), flush=True)
    await asyncio.Event().wait()


async def send(port: int, size_bytes: int) -> float:
    """Seconds from the first byte written until the server says that it has them all."""
    block = os.urandom(WRITE_BYTES)
    options = {**TRANSPORT_OPTIONS, "known_hosts": None, "client_keys": []}
    async with asyncssh.connect("127.0.0.1", port, username="bench", **options) as connection:
        stdin, stdout, _ = await connection.open_session("sink", encoding=None)
        started_s = time.perf_counter()
        for _ in range(size_bytes // WRITE_BYTES):
            stdin.write(block)
            await stdin.drain()
        stdin.write_eof()
        if await stdout.read(len(DONE)) != DONE:
            raise RuntimeError("the sink did not get everything")
        return time.perf_counter() - started_s


@contextmanager
def sink(directory: Path) -> Iterator[int]:
    """The port of a sink in a process of its own."""
    key = directory / "sink_key"
    if not key.exists():
        asyncssh.generate_private_key("ssh-ed25519").write_private_key(str(key))
    command = [sys.executable, "-m", MODULE, "serve", str(key)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.terminate()


def send_seconds(port: int, size_bytes: int) -> float:
    """The same from a process of its own."""
    command = [sys.executable, "-m", MODULE, "send", str(port), str(size_bytes)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
    return float(done.stdout)


def main(arguments: list[str]) -> None:
    """One end."""
    if arguments[0] == "serve":
        asyncio.run(serve(arguments[1]))
    else:
        print(asyncio.run(send(int(arguments[1]), int(arguments[2]))))


if __name__ == "__main__":
    main(sys.argv[1:])
