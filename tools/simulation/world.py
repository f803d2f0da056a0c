"""One run: what happens is drawn from the seed; then everything is healed, and looked at."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from typing import Final

from dmsync.engine.store import Store
from dmsync.errors import DmError, DotNotFound
from dmsync.storage.catalog import DotRow
from tools.simulation import steps
from tools.simulation.disk import FAULTS
from tools.simulation.history import Invocation
from tools.simulation.machines import TEN_YEARS_S, Machine
from tools.simulation.network import Weather
from tools.simulation.scene import Contents, Stage
from tools.simulation.scheduler import Scheduler
from tools.simulation.steps import Work, run_step

HEALED_WITHIN_S: Final = 3_600.0
"""Virtual time in which a run comes to its end: no fault lasts longer than minutes."""
CALM: Final = Weather(0.001, 1 << 20, 1 << 20)
Choice = Callable[["World", Random], Work]
AT_CLIENTS: Final[tuple[tuple[Choice, int], ...]] = (
    (steps.commit, 8),
    (steps.push_branches, 14),
    (steps.pull_branches, 4),
    (steps.fetch_branches, 2),
    (steps.pull_and_merge, 3),
    (steps.make_branch, 2),
    (steps.delete_branch, 1),
    (steps.make_tag, 1),
    (steps.take_back, 1),
    (steps.reset, 1),
    (steps.clone_dot, 1),
    (steps.thin, 1),
    (steps.collect, 2),
)
AT_SERVER: Final[tuple[tuple[Choice, int], ...]] = (
    (steps.commit, 3),
    (steps.make_branch, 1),
    (steps.delete_branch, 1),
    (steps.make_tag, 1),
    (steps.take_back, 1),
    (steps.collect, 4),
)


@dataclass(frozen=True)
class Plan:
    """Which kinds of trouble a run has: few kinds at a time find more than all at once."""

    rough_network: bool
    cuts: bool
    bad_disks: bool
    clocks: bool
    rivals: bool
    """Each command is given twice at the same time."""
    clones: bool
    collects: bool
    """gc again and again."""
    client_steps: int
    server_steps: int
    actors_count: int

    @classmethod
    def drawn(cls, random: Random) -> "Plan":
        return cls(
            random.random() < 0.6,
            random.random() < 0.5,
            random.random() < 0.3,
            random.random() < 0.3,
            random.random() < 0.25,
            random.random() < 0.5,
            random.random() < 0.25,
            random.randint(1, 3),
            random.randint(0, 2),
            random.choice((2, 2, 2, 3)),
        )

    @property
    def is_calm(self) -> bool:
        """No trouble at all: then nothing may be left lying about."""
        return not (self.rough_network or self.cuts or self.bad_disks)


@dataclass
class World:
    """Machines, and what is asked of them."""

    scheduler: Scheduler
    random: Random
    stage: Stage
    directory: str
    plan: Plan
    history: list[Invocation] = field(default_factory=list)
    errors: list[tuple[Invocation, DmError]] = field(default_factory=list)
    machines: dict[str, Machine] = field(default_factory=dict)
    trace: Callable[[str], None] | None = None
    healed_s: float = float("inf")
    """When all troubles were over."""

    def __post_init__(self) -> None:
        for name in ("server", "alice", "bob"):
            self.add_machine(name, self.stage.contents[name])
        self.dot = self.stage.dot
        self.looked_at = self.random.choice(("server", "alice", "bob", *[""] * 6))
        """Whose catalog is compared with its log afterwards, if anybody's: that takes longest."""

    def add_machine(self, name: str, contents: Contents) -> Machine:
        random = Random(f"{self.random.random()}:{name}")
        machine = Machine(name, self.directory, self.scheduler, random)
        machine.fill(contents)
        machine.told = self.tell
        self.machines[name] = machine
        return machine

    @property
    def server(self) -> Machine:
        return self.machines["server"]

    def row(self, store: Store) -> DotRow:
        """The dot. Raises DotNotFound: a clone was taken back."""
        row = store.catalog.dot(self.dot)
        if row is None or row.trash is not None:
            raise DotNotFound("no such dot here")
        return row

    def weather(self, random: Random, *, calm: bool) -> Weather:
        return CALM if calm else Weather.drawn(random, is_rough=self.plan.rough_network)

    # --- history --------------------------------------------------------------------------------

    def tell(self, what: str) -> None:
        if self.trace is not None:
            self.trace(f"{self.scheduler.now_s:10.3f} {what}")

    def invoke(self, machine: Machine, verb: str) -> Invocation:
        found = Invocation(len(self.history), machine.name, verb, self.scheduler.now_s)
        self.history.append(found)
        self.tell(f"#{found.number} {machine.name} {verb} begins")
        return found

    def concluded(self, invocation: Invocation) -> None:
        invocation.ended_s = self.scheduler.now_s
        self.tell(invocation.line().strip())

    def note_error(self, invocation: Invocation, error: DmError) -> None:
        self.errors.append((invocation, error))

    # --- what happens -----------------------------------------------------------------------------

    async def happen(self) -> None:
        """Everything that was drawn, then healing."""
        plan, random = self.plan, self.random
        clients = [self.machines["alice"], self.machines["bob"]]
        work = [
            self._act(clients[number % 2], AT_CLIENTS, plan.client_steps, Random(random.random()))
            for number in range(plan.actors_count)
        ]
        work.append(self._act(self.server, AT_SERVER, plan.server_steps, Random(random.random())))
        nemesis = asyncio.ensure_future(self._trouble(Random(random.random())))
        await asyncio.gather(*work)
        nemesis.cancel()
        await asyncio.wait([nemesis])
        await self._heal()

    async def _act(
        self,
        machine: Machine,
        choices: tuple[tuple[Choice, int], ...],
        count: int,
        random: Random,
    ) -> None:
        made, weights = zip(*choices, strict=True)
        pauses_s = random.choice(((0.0,), (0.0, 0.0, 0.01, 0.4, 4.0)))
        for number in range(count):
            await asyncio.sleep(random.choice(pauses_s))
            (make,) = random.choices(made, weights)
            if not number and random.random() < 0.6:
                make = steps.commit  # what is to be pushed
            elif self.plan.collects and random.random() < 0.4:
                make = steps.collect
            elif self.plan.rivals and random.random() < 0.5:
                make = random.choice((steps.make_branch, steps.make_tag))
            drawn = random.random()
            rivals = 2 if self.plan.rivals else random.choice((1, 1, 1, 1, 2))
            works = [make(self, Random(drawn)) for _ in range(rivals)]
            # rivals do the very same thing at the same time
            await asyncio.gather(*(run_step(self, machine, make.__name__, work) for work in works))

    async def _trouble(self, random: Random) -> None:
        plan = self.plan
        kinds = [self._cut_power] * plan.cuts + [self._fail_disk] * plan.bad_disks
        kinds += [self._turn_clock] * plan.clocks
        while kinds:
            await asyncio.sleep(random.choice((0.0, 0.001, 0.01, 0.1, 1.0)))
            random.choice(kinds)(random.choice(list(self.machines.values())), random)

    def _cut_power(self, machine: Machine, random: Random) -> None:
        if machine.is_up and machine.cuts_count < 2 and machine.disk.cut_at is None:
            machine.lose_power_at(int(2 ** random.uniform(0, 6.5)), power=random.random() < 0.7)

    def _fail_disk(self, machine: Machine, random: Random) -> None:
        if machine.disk.fault is not None:
            return
        fault = random.choice(FAULTS)(random)
        fault.after = machine.disk.calls + int(2 ** random.uniform(0, 6))
        machine.disk.fault = fault

    def _turn_clock(self, machine: Machine, random: Random) -> None:
        machine.jump(random.choice((-TEN_YEARS_S, TEN_YEARS_S, -5.0, 3_600.0, 86_400.0 * 20)))
        machine.strobe(random.choice((0.0, 0.0, 0.004, 262.0)))

    # --- afterwards -------------------------------------------------------------------------------

    async def _heal(self) -> None:
        """No more trouble: what failed is tried again, and a clone made."""
        for machine in self.machines.values():
            await machine.up()
            machine.disk.cut_at = None
            machine.disk.fault = None
            machine.strobe(0.0)
        self.healed_s = self.scheduler.now_s
        self.tell("everything heals")
        random = Random(self.random.random())
        for invocation in [i for i in self.history if i.result == "unknown"]:
            again = _AGAIN.get(invocation.verb)
            if again is not None:
                machine = self.machines[invocation.machine]
                await run_step(self, machine, invocation.verb, again(self, random))
        if self.plan.clones:
            fresh = self.add_machine("fresh", self.stage.contents["fresh"])
            await run_step(self, fresh, "clone_dot", steps.clone_dot(self, random, calm=True))
        for machine in self.machines.values():
            await machine.quiet()  # servers may wait a while for who is gone


def _calm(make: Callable[..., Work]) -> Callable[[World, Random], Work]:
    return lambda world, random: make(world, random, calm=True)


_AGAIN: Final = {
    make.__name__: _calm(make)
    for make in (
        steps.push_branches,
        steps.fetch_branches,
        steps.pull_branches,
        steps.pull_and_merge,
        steps.clone_dot,
    )
}
