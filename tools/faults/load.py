"""A real `dm serve --listen` with many sessions at work beside ten times as many stalled peers.

Stalled ones connect from several addresses, say nothing, or half a greeting, and come again when
they are thrown out. What counts: pushes go on being taken, how long one takes, memory, and that
nothing is left open afterwards.
"""

import asyncio
import contextlib
import os
import re
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dmsync.core.ids import DotId
from dmsync.core.names import parse_remote_url
from dmsync.engine.session import Session
from dmsync.engine.sync_opening import hello
from dmsync.engine.sync_push import PushRequest, push
from dmsync.errors import DmError
from dmsync.transports.connecting import connect
from dmsync.transports.ssh_settings import SshSettings
from dmsync.wire.connection import Role
from dmsync.wire.messages import Hello, Intent, Refs, RefsReply
from tests.support.keys import KeyPair, known_hosts_line, make_key
from tests.support.processes import Daemon, wait_until
from tests.support.sync_stores import FakeStore
from tools.faults.row import Budget, Row

_ROOT = Path(__file__).parents[2]
_STALLED_PER_SESSION = 10
_SOURCES = 100
_PUSHES_MIN = 40
_MEMORY_MIB_MAX = 1024
_SLOWER_MAX = 2.0
_PUSHES_FOR_P99 = 100
"""Of fewer the slowest one would decide, so their times are told and not judged."""
_DEADLINE_S = 60.0
_ASKING_EVERY_S = 3.0


@dataclass
class _Place:
    """A served store, a client's store with a dot, and the keys between them."""

    directory: Path
    key: KeyPair
    host_key: KeyPair
    server: Daemon
    port: int
    store: FakeStore
    dot: DotId
    serial: int = 0
    times_s: list[float] = field(default_factory=list)

    def settings(self) -> SshSettings:
        """How to reach the server."""
        return SshSettings(
            accepted_hosts_file=str(self.directory / "known_hosts"),
            key_file=str(self.key.private),
        )

    def memory_mib(self) -> int:
        """The server's resident set now, in MiB."""
        text = Path(f"/proc/{self.server.process.pid}/status").read_text()
        found = re.search(r"VmRSS:\s+(\d+)", text)
        return int(found.group(1)) // 1024 if found else 0

    def sockets(self) -> int:
        """Sockets the server has open; files of packs are more with each push, up to a bound."""
        directory = f"/proc/{self.server.process.pid}/fd"
        found = 0
        for name in os.listdir(directory):
            with contextlib.suppress(FileNotFoundError):
                found += os.readlink(f"{directory}/{name}").startswith("socket:")
        return found


def run(budget: Budget) -> list[Row]:
    """One row; the count is of sessions at work."""
    sessions = budget.count or 500
    row = Row(
        "load",
        "pushes beside stalled peers",
        budget.seed,
        f"python -m tools.faults load --count {sessions}",
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    place = _place(Path(budget.directory))
    try:
        asyncio.run(_load(row, place, sessions))
        if place.server.process.poll() is not None:
            row.lost("the server ended")
    finally:
        place.store.close()
        place.server.kill()
    return [row]


def _place(directory: Path) -> _Place:
    host_key, key = make_key(directory / "host_key", "host"), make_key(directory / "key", "user")
    (directory / "authorized_keys").write_text(key.public + "\n")
    (directory / "authorized_keys").chmod(0o600)
    home = directory / "served"
    FakeStore(str(home)).close()
    command = [sys.executable, "-m", "dmsync", "--home", str(home), "serve"]
    command += ["--listen", "127.0.0.1:0", "--host-key", str(host_key.private)]
    command += ["--authorized-keys", str(directory / "authorized_keys")]
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "HOME": str(directory)}
    log = directory / "served.log"
    server = Daemon(command, log=log, environment=environment)
    said = wait_until(
        lambda: re.search(r"listening on \S+:(\d+)", log.read_text()), what="the server listens"
    )
    port = int(said.group(1))
    (directory / "known_hosts").write_text(known_hosts_line(port, host_key.public))
    store = FakeStore(str(directory / "local"))
    store.add_remote()
    return _Place(directory, key, host_key, server, port, store, store.create_dot("apples", ""))


async def _load(row: Row, place: _Place, sessions: int) -> None:
    pushes = max(_PUSHES_MIN, sessions // 2)
    for _ in range(5):
        await _push(place, row)  # warm
    place.times_s.clear()
    open_before, memory_before = place.sockets(), place.memory_mib()
    await _pushes(place, row, pushes)
    idle_s = sorted(place.times_s)
    place.times_s = []
    stalled = _Stalled(place.port, sessions * _STALLED_PER_SESSION)
    working = []
    for _ in range(sessions):
        is_open = asyncio.Event()
        working.append(asyncio.create_task(_session(place, row, is_open)))
        await is_open.wait()
    stalling = asyncio.create_task(stalled.run())
    await asyncio.sleep(2.0)
    await _pushes(place, row, pushes)
    memory, open_during = place.memory_mib(), place.sockets()
    for task in (stalling, *working):
        task.cancel()
    await asyncio.gather(stalling, *working, return_exceptions=True)
    loaded_s = sorted(place.times_s)
    left = await _settled(place, open_before)
    row.tried = len(loaded_s) + row.losses
    row.counts |= {
        "sessions": sessions,
        "stalled": sessions * _STALLED_PER_SESSION,
        "stalled connects": stalled.connects,
        "idle p50 ms": _ms(idle_s, 0.5),
        "idle p99 ms": _ms(idle_s, 0.99),
        "loaded p50 ms": _ms(loaded_s, 0.5),
        "loaded p99 ms": _ms(loaded_s, 0.99),
        "RSS MiB": memory,
        "RSS idle MiB": memory_before,
        "sockets": open_during,
        "sockets after": left,
    }
    if memory > _MEMORY_MIB_MAX:
        row.lost(f"the server holds {memory} MiB")
    if left > open_before:
        row.lost(f"{left - open_before} sockets are left open")
    idle_ms, loaded_ms = _ms(idle_s, 0.99), _ms(loaded_s, 0.99)
    if len(loaded_s) >= _PUSHES_FOR_P99 and loaded_ms > _SLOWER_MAX * idle_ms:
        row.lost(f"p99 is {loaded_ms} ms, idle {idle_ms} ms")


def _ms(times_s: list[float], share: float) -> int:
    if not times_s:
        return 0
    return round(times_s[min(len(times_s) - 1, int(len(times_s) * share))] * 1000)


async def _pushes(place: _Place, row: Row, count: int) -> None:
    for _ in range(count):
        await _push(place, row)


async def _push(place: _Place, row: Row) -> None:
    """One commit and its push, over a connection of its own."""
    place.serial += 1
    place.store.commit(place.dot, {"a": b"%d" % place.serial})
    request = PushRequest("origin", place.dot, ("master",), actor="me", remote_name="apples")
    began = time.monotonic()
    try:
        async with asyncio.timeout(_DEADLINE_S), _stream(place) as stream:
            await push(place.store, stream, request)
    except (DmError, TimeoutError) as exc:
        row.lost(f"push {place.serial}: {type(exc).__name__}: {exc}")
        return
    place.times_s.append(time.monotonic() - began)


def _stream(place: _Place) -> contextlib.AbstractAsyncContextManager[Any]:
    return connect(parse_remote_url(f"ssh://127.0.0.1:{place.port}"), place.settings())


async def _session(place: _Place, row: Row, is_open: asyncio.Event) -> None:
    """One client that stays and asks now and then."""
    try:
        async with _stream(place) as stream, Session(stream, Role.CLIENT) as session:
            await session.send(hello(place.store))
            await session.expect(Hello)
            is_open.set()
            while True:
                await session.send(Refs(None, None, "apples", Intent.PULL))
                while not (await session.expect(RefsReply)).last:
                    pass
                await asyncio.sleep(_ASKING_EVERY_S)
    except DmError as exc:
        row.lost(f"a session: {exc.message}")
    finally:
        is_open.set()


async def _settled(place: _Place, open_before: int) -> int:
    """Sockets of the server when it has noticed that everybody left."""
    for _ in range(75):
        if place.sockets() <= open_before:
            break
        await asyncio.sleep(0.2)
    return place.sockets()


class _Stalled:
    """Connections that never log in, and come back."""

    def __init__(self, port: int, count: int) -> None:
        self._port = port
        self._count = count
        self.connects = 0

    async def run(self) -> None:
        await asyncio.gather(*(self._stall(number) for number in range(self._count)))

    async def _stall(self, number: int) -> None:
        source = f"127.0.{1 + number % _SOURCES // 250}.{2 + number % _SOURCES % 250}"
        await asyncio.sleep(number % 100 / 50)
        while True:
            with contextlib.suppress(OSError):
                await self._once(source, number)
            await asyncio.sleep(5.0 + number % 50 / 10)

    async def _once(self, source: str, number: int) -> None:
        self.connects += 1
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self._port, local_addr=(source, 0)
        )
        try:
            if number % 2:
                writer.write(b"SSH-2.0-sta")
            while await reader.read(1000):
                pass
        finally:
            writer.close()
