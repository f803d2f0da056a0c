"""Simulated machines: a clock, a disk with one store, processes; they lose power and come back."""

import asyncio
import os
import shutil
from collections.abc import Callable
from random import Random
from typing import TYPE_CHECKING, Any, Final, TypeVar

from dmsync.engine.settings import EngineSettings, Holding
from dmsync.engine.store import Store
from dmsync.engine.sync_server import serve
from dmsync.engine.target_tree import TARGET_TREE
from dmsync.errors import DmError, NetworkError
from tools.simulation.disk import Disk
from tools.simulation.network import End, Link, Weather
from tools.simulation.scheduler import PowerCut, Process, Scheduler
from tools.simulation.seams import EPOCH_NS

if TYPE_CHECKING:
    from tools.simulation.scene import Contents

ResultT = TypeVar("ResultT")
LOCK_WAIT_S: Final = 20.0
TEN_YEARS_S: Final = 10 * 365 * 86_400


class Trusted:
    """Access of a peer who may do everything. `actor` tells whose push an operation was."""

    user = "admin"
    default_namespace = "admin"
    login = ""
    address = ""

    def __init__(self, actor: str) -> None:
        self.actor = actor

    def may(self, namespace: str, name: str, verb: str) -> bool:
        return True


class Machine:
    """One machine. Its store's directory is another one after each loss of power."""

    def __init__(self, name: str, directory: str, scheduler: Scheduler, random: Random) -> None:
        self.name = name
        self.scheduler = scheduler
        self.random = random
        self.links: list[Link] = []
        self.processes: list[Process] = []
        self.cuts_count = 0
        self.failed_calls = 0
        self.crashes: list[Exception] = []
        """What ended processes and is no error of ours."""
        self._is_up_again = asyncio.Event()
        self._is_up_again.set()
        self.told: Callable[[str], None] = lambda text: None
        self._offset_ns = 0
        self._strobe_ns = 0
        self._directory = directory
        self._life = 0
        self._power = True
        self._numbers = 0
        self.disk = self._new_disk()

    @property
    def is_up(self) -> bool:
        return self._is_up_again.is_set()

    @property
    def home(self) -> str:
        return self.disk.home

    def _new_disk(self) -> Disk:
        home = os.path.join(self._directory, f"{self.name}{self._life}")
        graves = f"{home}-graves"
        os.makedirs(graves)
        return Disk(home, graves)

    def fill(self, contents: "Contents") -> None:
        """Put a store onto an empty disk."""
        contents.write(self.home)

    # --- clock ----------------------------------------------------------------------------------

    def wall_ns(self) -> int:
        strobe_ns = self.random.randrange(self._strobe_ns) if self._strobe_ns else 0
        return EPOCH_NS + int(self.scheduler.now_s * 1e9) + self._offset_ns + strobe_ns

    def jump(self, seconds: float) -> None:
        """Set the clock. It never gets further off than eleven years."""
        offset_s = self._offset_ns / 1e9 + seconds
        if abs(offset_s) < TEN_YEARS_S * 1.1:
            self._offset_ns = int(offset_s * 1e9)

    def strobe(self, seconds: float) -> None:
        """From now on each look at the clock is off by up to so much."""
        self._strobe_ns = int(seconds * 1e9)

    # --- power ----------------------------------------------------------------------------------

    def lose_power(self, *, power: bool | None = None) -> None:
        """Now: what the disk does not hold durably is gone, or (a kill) only what runs."""
        with self.scheduler.apart():
            self._go_down(power=self._power if power is None else power)

    def _go_down(self, *, power: bool) -> None:
        old = self.disk
        self.cuts_count += 1
        self.failed_calls += old.failed_calls
        self._life += 1
        self._is_up_again.clear()
        self.disk = self._new_disk()
        os.makedirs(self.home, exist_ok=True)
        old.survive(self.home, self.random, power=power)
        self.told(f"{self.name} {'loses power' if power else 'is killed'}")
        for link in self.links:
            link.cut()
        self.links.clear()
        for process in self.processes:
            self.scheduler.kill(process)
        self.processes.clear()
        if self.scheduler.is_running():
            back = self._come_back(self.random.choice((0.01, 3.0, 100.0)))
            self.scheduler.start(self.scheduler.outside, back)

    def lose_power_at(self, calls: int, *, power: bool) -> None:
        """Lose it `calls` changing system calls from now."""
        self._power = power
        self.disk.cut_at = self.disk.calls + calls

    async def _come_back(self, after_s: float) -> None:
        await asyncio.sleep(after_s)
        self._is_up_again.set()
        self.told(f"{self.name} is up again")

    async def up(self) -> None:
        await self._is_up_again.wait()

    # --- processes ------------------------------------------------------------------------------

    def process(self, what: str) -> Process:
        self._numbers += 1
        process = Process(self.scheduler, f"{self.name}{self._life}.{self._numbers}.{what}", self)
        self.processes.append(process)
        return process

    async def quiet(self) -> None:
        """Wait until nothing runs here."""
        for process in tuple(self.processes):
            await asyncio.wait(process.tasks)

    def ended(self, process: Process) -> None:
        if process in self.processes:
            self.processes.remove(process)
        self.scheduler.forget(process)

    def open(self, holding: Holding = "wait") -> Store:
        return Store.open(self.home, settings(self.name, holding))


def settings(name: str, holding: Holding = "wait") -> EngineSettings:
    author = f"{name} <{name}@simulation>"
    return EngineSettings(author, name, "admin", LOCK_WAIT_S, say=_silent, holding=holding)


def _silent(message: str) -> None:
    pass


def connect(
    client: Machine, server: Machine, weather: Weather, random: Random, actor: str = "admin"
) -> End:
    """A connection to the server's machine, where a process of its own serves it.

    Raises:
        NetworkError: the server is down.
    """
    if not server.is_up or not client.is_up:
        raise NetworkError("nobody answers")
    link = Link(client.scheduler, random, weather)
    client.links.append(link)
    server.links.append(link)
    process = server.process("serve")
    client.scheduler.start(process, _serve(server, process, link, actor))
    return link.client


async def _serve(server: Machine, process: Process, link: Link, actor: str) -> None:
    try:
        store = await asyncio.to_thread(server.open, "never")
        try:
            access: Any = Trusted(actor)
            await serve(store, link.server, access, TARGET_TREE)
        finally:
            await asyncio.to_thread(store.close)
    except (DmError, PowerCut):
        pass  # the client was told, or is not there
    except Exception as exc:
        if not process.is_dead:
            server.crashes.append(exc)
    finally:
        await link.server.aclose()
        server.ended(process)
        if link in server.links:
            server.links.remove(link)


def remove(directory: str) -> None:
    shutil.rmtree(directory, ignore_errors=True)
