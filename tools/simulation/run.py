"""Runs a seed, and many of them."""

import asyncio
import os
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Final

from dmsync.core.events import DotCreated
from dmsync.core.ids import DotId
from dmsync.engine.remotes import add_remote
from dmsync.engine.store import Store
from dmsync.engine.sync_pull import CloneRequest, clone
from dmsync.engine.target_tree import TARGET_TREE
from tools.simulation.checking import history_hash, left_behind, problems
from tools.simulation.disk import scratch
from tools.simulation.machines import Machine, connect, settings
from tools.simulation.network import Weather
from tools.simulation.scene import DOT_NAME, Contents, Stage, commit_files
from tools.simulation.scheduler import Hung, Scheduler
from tools.simulation.seams import installed
from tools.simulation.world import CALM, HEALED_WITHIN_S, Plan, World

STAGE_SEED: Final = 20


@dataclass
class Outcome:
    """What one seed gave. `history_hash` is of all event logs at the end."""

    seed: int
    history_hash: str = ""
    problems: list[str] = field(default_factory=list)
    steps: int = 0
    invocations: int = 0
    unknown: int = 0
    acknowledged: int = 0
    cuts: int = 0
    failed_calls: int = 0
    virtual_s: float = 0.0
    cpu_s: float = 0.0

    @property
    def repeat(self) -> str:
        return f"python -m tools.simulation {self.seed} --trace"


def simulate(
    seed: int,
    trace: Callable[[str], None] | None = None,
    fault: Callable[[], None] | None = None,
) -> Outcome:
    """One run. What goes wrong is among its problems; nothing is raised. `fault`: see installed."""
    began_cpu_s = time.process_time()
    stage = the_stage()
    outcome = Outcome(seed)
    with scratch(str(seed)) as directory:
        _simulate(seed, stage, directory, outcome, trace, fault)
    outcome.cpu_s = time.process_time() - began_cpu_s
    return outcome


def _simulate(
    seed: int,
    stage: Stage,
    directory: str,
    outcome: Outcome,
    trace: Callable[[str], None] | None,
    fault: Callable[[], None] | None,
) -> None:
    random = Random(seed)
    scheduler = Scheduler(Random(random.random()), hold_one_in=random.choice((2, 6, 30)))
    with installed(scheduler, Random(random.random()), fault):
        world = World(scheduler, random, stage, directory, Plan.drawn(random), trace=trace)
        world.tell(f"seed {seed}: {world.plan}")
        try:
            scheduler.run_until_complete(_within_time(world))
            outcome.problems += left_behind(world)
            if not world.plan.is_calm:
                for machine in world.machines.values():
                    machine.lose_power(power=True)
            outcome.problems += problems(world)
        except (TimeoutError, Hung) as exc:
            outcome.problems.append(f"it does not end: {exc or 'still running'}; {_running(world)}")
        except Exception as exc:
            outcome.problems.append(f"{type(exc).__name__}: {exc}")
            if trace is not None:
                trace(traceback.format_exc())
        finally:
            outcome.history_hash = history_hash(world)
            scheduler.close()
    _count(world, outcome)
    for problem in outcome.problems:
        world.tell(f"PROBLEM: {problem}")


async def _within_time(world: World) -> None:
    async with asyncio.timeout(HEALED_WITHIN_S):
        await world.happen()


def _running(world: World) -> str:
    return ", ".join(
        f"#{i.number} {i.machine} {i.verb}" for i in world.history if i.result == "running"
    )


def _count(world: World, outcome: Outcome) -> None:
    machines = world.machines.values()
    outcome.steps = world.scheduler.steps
    outcome.virtual_s = world.scheduler.now_s
    outcome.invocations = len(world.history)
    outcome.unknown = sum(i.result == "unknown" for i in world.history)
    outcome.acknowledged = sum(len(i.promises) for i in world.history if i.result == "ok")
    outcome.cuts = sum(machine.cuts_count for machine in machines)
    outcome.failed_calls = sum(m.failed_calls + m.disk.failed_calls for m in machines)


# --- the stage ------------------------------------------------------------------------------------


@cache
def the_stage() -> Stage:
    """The stores that every run begins with, made by the product; the same in every process."""
    random = Random(STAGE_SEED)
    scheduler = Scheduler(Random(STAGE_SEED))
    with scratch("stage") as directory, installed(scheduler, random):
        stage = scheduler.run_until_complete(_make_stage(scheduler, directory, random))
        scheduler.close()
        return stage


async def _make_stage(scheduler: Scheduler, directory: str, random: Random) -> Stage:
    dot = DotId(random.randbytes(16))
    machines = {
        name: Machine(name, directory, scheduler, random)
        for name in ("server", "alice", "bob", "fresh")
    }
    server = machines["server"]
    process = server.process("make")
    await scheduler.start(process, asyncio.to_thread(_fill_server, server, dot, random))
    for name, machine in machines.items():
        if machine is not server:
            process = machine.process("make")
            await scheduler.start(process, _fill_client(machine, server, random, name != "fresh"))
    contents = {name: Contents.of(machine.home) for name, machine in machines.items()}
    return Stage(dot, contents)


def _fill_server(machine: Machine, dot: DotId, random: Random) -> None:
    with Store.open(machine.home, settings(machine.name), create=True) as store:
        with store.transaction("init") as tx:
            tx.append(DotCreated(dot, "admin", DOT_NAME, machine.name))
        for _ in range(2):
            commit_files(store, dot, "master", random, os.urandom(16))


async def _fill_client(machine: Machine, server: Machine, random: Random, has_clone: bool) -> None:
    store = await asyncio.to_thread(
        lambda: Store.open(machine.home, settings(machine.name), create=True)
    )
    await asyncio.to_thread(add_remote, store, "origin", "ssh://dm@server")
    if has_clone:
        weather: Weather = CALM
        stream = connect(machine, server, weather, random)
        request = CloneRequest("origin", DOT_NAME, "admin", actor="me")
        await clone(store, stream, request, TARGET_TREE)
    await asyncio.to_thread(store.close)
