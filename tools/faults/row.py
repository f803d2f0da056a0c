"""What one kind of fault is told before it runs, and what it says afterwards."""

import random
from dataclasses import dataclass, field
from typing import Final

FAILURES_SHOWN: Final = 20


@dataclass(frozen=True)
class Budget:
    """How much to try. `count` is in the row's own unit; None: all there is.

    `directory` is scratch space of this row alone, emptied afterwards. `deadline_s`, on
    time.monotonic(): start nothing new after it; what was tried until then is the count.
    """

    directory: str
    seed: int
    count: int | None
    is_long: bool = False
    jobs: int = 2
    deadline_s: float | None = None

    def random(self, *what: object) -> random.Random:
        """A generator for one purpose, the same for the same seed."""
        return random.Random(":".join(map(str, (self.seed, *what))))


@dataclass
class Row:
    """One line of the table. `losses` counts tries that ended with a broken promise.

    `counts` holds what else is worth a number, such as acknowledgements seen. A control is a row
    that has to find losses: with its fault seeded, `losses` is what was caught.
    """

    name: str
    unit: str
    """What was tried, as a plural: cuts, states, kills."""
    seed: int
    repeat: str
    """The command that repeats this row."""
    tried: int = 0
    losses: int = 0
    counts: dict[str, int | float | str] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    """One line for each loss, with what repeats it alone; the first FAILURES_SHOWN."""
    is_control: bool = False
    elapsed_s: float = 0.0

    def lost(self, what: str) -> None:
        """Note a broken promise."""
        self.losses += 1
        if len(self.failures) < FAILURES_SHOWN:
            self.failures.append(what)

    @property
    def holds(self) -> bool:
        """Did the row show what it has to: no loss, or, of a control, at least one?"""
        return self.tried > 0 and bool(self.losses) == self.is_control
