"""Users x dots x verbs over real connections: our SSH server, keys of every kind, raw requests.

Each cell of the table (access_cells) is one session; afterwards the store is looked at. Then what
no key may ask for, and how long a dot that is not there and one that is not for the user take.
"""

import asyncio
import contextlib
import os
import pwd
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from dmsync.engine.session import Session
from dmsync.engine.sync_opening import hello
from dmsync.errors import AccessDenied
from dmsync.transports.ssh_library import asyncssh
from dmsync.wire.connection import Role
from dmsync.wire.messages import Hello, Intent, Refs, RefsReply
from tools.faults.access_cells import NOWHERE, OWNER, USERS, Cell, Level, User, cells
from tools.faults.access_scene import Scene, try_cell
from tools.faults.row import Budget, Row

ROOT: Final = Path(__file__).resolve().parents[2]
TIMED_PAIRS: Final = 150
TIMED_ROUNDS: Final = 12
DIFFERENCE_MAX: Final = 0.05
"""Of the median: what an observer may at most see of whether a dot is there."""
_ASKED: Final = {
    "delete-branch": "dm branch -d master",
    "delete-tag": "dm tag -d known",
    "delete-dot": "dm dot delete -f alice/own",
    "rename-branch": "dm branch -m master other",
    "gc": "dm gc --grace 0s",
    "shell": None,
    "sftp": "internal-sftp",
}


def run(budget: Budget) -> list[Row]:
    """The row of cells, and that of times."""
    repeat = f"python -m tools.faults access --seed {budget.seed}"
    row = Row("access", "cells", budget.seed, repeat)
    chosen = list(cells())
    if budget.count is not None and budget.count < len(chosen):
        chosen = budget.random("cells").sample(chosen, budget.count)
        chosen.sort(key=lambda cell: USERS.index(cell.user))
    times = Row("access, times", "questions", budget.seed, repeat)
    with contextlib.closing(_Place(Path(budget.directory))) as place:
        asyncio.run(_try_all(place, chosen, row))
        asyncio.run(_compare_times(place, times))
    return [row, times]


@dataclass
class _Place:
    """Store, keys and server of one run."""

    directory: Path
    scene: Scene = field(init=False)
    server: "subprocess.Popen[str]" = field(init=False)
    port: int = 0
    keys: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        self.scene = Scene(str(self.directory / "store"))
        lines = []
        for number, user in enumerate(USERS):
            key = asyncssh.generate_private_key("ssh-ed25519")
            path = self.directory / f"key-{number}"
            path.touch(mode=0o600)
            key.write_private_key(str(path))
            self.keys[user.name] = str(path)
            public = key.export_public_key("openssh").decode().strip()
            if user.options is not None:
                lines.append(f"{user.options} {public}".strip())
        authorized = self.directory / "authorized_keys"
        authorized.touch(mode=0o600)
        authorized.write_text("\n".join(lines) + "\n")
        self.server = self._serve(authorized)

    def _serve(self, authorized: Path) -> "subprocess.Popen[str]":
        words = ("serve", "--listen", "127.0.0.1:0", "--authorized-keys", str(authorized))
        server = subprocess.Popen(
            [sys.executable, "-m", "dmsync", *words, "--host-key", str(self.directory / "host")],
            env={
                "PYTHONPATH": str(ROOT),
                "DM_HOME": self.scene.home,
                "HOME": str(self.directory),
                "PATH": os.environ.get("PATH", ""),
            },
            stdout=subprocess.PIPE,
            stderr=(self.directory / "serve.log").open("w"),
            text=True,
        )
        assert server.stdout is not None
        found = re.search(r":(\d+)\s*$", server.stdout.readline())
        assert found is not None, (self.directory / "serve.log").read_text()
        self.port = int(found[1])
        return server

    def close(self) -> None:
        self.server.terminate()
        self.server.wait(20)
        self.scene.close()

    @property
    def refused_lines(self) -> list[str]:
        return (self.directory / "serve.log").read_text().splitlines()

    def login(self, user: User) -> str:
        return pwd.getpwuid(os.geteuid()).pw_name if user.login == OWNER else user.login

    @contextlib.asynccontextmanager
    async def connected(self, user: User) -> AsyncIterator[Any]:
        """A connection that logs in as asyncssh does. Raises AccessDenied."""
        try:
            connection = await asyncssh.connect(
                "127.0.0.1",
                self.port,
                username=self.login(user),
                client_keys=[self.keys[user.name]],
                agent_path=None,
                known_hosts=None,
                config=None,
            )
        except asyncssh.PermissionDenied as exc:
            raise AccessDenied("no login") from exc
        try:
            yield connection
        finally:
            connection.close()
            await connection.wait_closed()

    async def stream(self, connection: Any) -> Any:
        """A session of dmsync/1 on a connection that is there."""
        from dmsync.transports.ssh_client import ClientStream

        stream = ClientStream("127.0.0.1")
        await connection.create_session(lambda: stream, "dm serve --stdio", encoding=None)
        return stream


async def _try_all(place: _Place, chosen: list[Cell], row: Row) -> None:
    """One connection a user, one session a cell; a refused login is tried for each verb once."""
    for user in USERS:
        of_user = [cell for cell in chosen if cell.user is user]
        if not of_user:
            continue
        if user.levels[0] is Level.NO_LOGIN:
            await _try_login(place, user, of_user, row)
            continue
        async with place.connected(user) as connection:
            for cell in of_user:
                row.tried += 1
                wrong = await _try(place, connection, cell)
                if wrong:
                    row.lost(f"{cell}: {wrong}")
    row.counts["users"] = len({cell.user.name for cell in chosen})
    row.counts["refusals logged"] = sum("refused" in line for line in place.refused_lines)


async def _try_login(place: _Place, user: User, of_user: list[Cell], row: Row) -> None:
    """Whoever does not come in is told nothing about any cell: one login stands for all."""
    before = place.scene.store.catalog.last_seq()
    for _ in range(3):
        try:
            async with place.connected(user):
                row.lost(f"{user.name}: logged in")
        except AccessDenied:
            pass
    if place.scene.store.catalog.last_seq() != before:
        row.lost(f"{user.name}: the log grew")
    row.tried += len(of_user)


async def _try(place: _Place, connection: Any, cell: Cell) -> str:
    if cell.verb in NOWHERE:
        return await _try_command(place, connection, cell.verb)

    async def session(_: Cell) -> Any:
        return await place.stream(connection)

    return await asyncio.wait_for(try_cell(place.scene, cell, session), 60)


async def _try_command(place: _Place, connection: Any, verb: str) -> str:
    """Another command than a session of dm: refused, whoever asks, and nothing changes."""
    before = place.scene.store.catalog.last_seq()
    if verb == "sftp":
        done = await connection.run(subsystem="sftp", input="")
    else:
        done = await connection.run(_ASKED[verb], input="")
    if done.exit_status in (0, None) or done.stdout:
        return f"ended with {done.exit_status} and said {done.stdout!r}"
    return "the log grew" if place.scene.store.catalog.last_seq() != before else ""


# --- times ----------------------------------------------------------------------------------------


async def _compare_times(place: _Place, row: Row) -> None:
    """A stranger asks for a dot that is there and one that is not, in turn."""
    stranger = next(user for user in USERS if user.name == "stranger")
    differences = []
    async with place.connected(stranger) as connection:
        for _ in range(TIMED_ROUNDS):
            stream = await place.stream(connection)
            async with Session(stream, Role.CLIENT) as session:
                await session.send(hello(place.scene.store))
                await session.expect(Hello)
                differences.append(await _difference(session))
            row.tried += 2 * TIMED_PAIRS
            if abs(differences[-1]) <= DIFFERENCE_MAX:
                break  # one quiet round shows it: a real difference is in every one
    smallest = min(differences, key=abs)
    row.counts["difference of the medians"] = f"{100 * smallest:+.1f} %"
    if abs(smallest) > DIFFERENCE_MAX:
        row.lost(f"medians differ by {100 * smallest:.1f} % in each of {len(differences)} rounds")


async def _difference(session: Session) -> float:
    """How much longer the forbidden dot takes than the absent one, as a share of the median."""
    taken: dict[str, list[float]] = {"his": [], "not": []}
    for number in range(2 * TIMED_PAIRS):
        name = ("his", "not")[(number + number // 2) % 2]
        began = time.perf_counter()
        await session.send(Refs(None, "bob", name, Intent.LIST))
        reply = await session.expect(RefsReply)
        taken[name].append(time.perf_counter() - began)
        assert reply.dot is None
    forbidden, absent = statistics.median(taken["his"]), statistics.median(taken["not"])
    return (forbidden - absent) / absent
