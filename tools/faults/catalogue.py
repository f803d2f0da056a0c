"""Which kinds of fault there are, and how much of each the two forms of the scorecard try."""

from dataclasses import dataclass
from importlib import import_module
from typing import Final

from tools.faults.row import Budget, Row


@dataclass(frozen=True)
class Entry:
    """`short` and `long` are counts in the row's unit; None: all there is. `share`: how much of
    the long form's time, and which begin first."""

    module: str
    what: str
    short: int | None
    long: int | None
    share: int = 1

    def run(self, budget: Budget) -> list[Row]:
        rows: list[Row] = import_module(f"tools.faults.{self.module}").run(budget)
        return rows


CATALOGUE: Final = {
    "power-cuts": Entry("power_cuts", "journal-level power cuts on ext4 and XFS", 60, 2_000, 8),
    "block-states": Entry(
        "block_states", "reordered, torn, dropped writes: ext4, XFS, btrfs", 120, 3_000, 6
    ),
    "kills": Entry("kills", "SIGKILL at system call boundaries", 150, None, 14),
    "errors": Entry("errors", "system calls that fail", 200, 20_000, 16),
    "load-kills": Entry("load_kills", "SIGKILL for several dm at once", 4, 500, 3),
    "controls": Entry("controls", "the twelve seeded faults, each to be caught", None, None, 2),
    "exhaustion": Entry("exhaustion", "space, inodes, descriptors, memory run out", 40, 5_000, 4),
    "simulation": Entry("simulation", "seeds of client, server, client, gc", 400, 10_000, 8),
    "corruption": Entry("corruption", "damaged files of a store", 100, None, 3),
    "races": Entry("races", "path races, each system call kind", 1_000, 100_000, 4),
    "content": Entry("content", "hostile names, links, modes, sizes", None, None),
    "cases": Entry("cases", "known vulnerability classes replayed", None, None),
    "fuzz": Entry("fuzz", "fuzzed inputs, each decoder", 1_000, 100_000, 6),
    "flips": Entry("flips", "flipped bytes of recorded sessions", 300, None, 5),
    "load": Entry("load", "sessions beside stalled ones", 30, 500, 2),
    "access": Entry("access", "cells of users x dots x verbs", None, None),
    "collection": Entry("collection", "gc beside every command", 10, 5_000, 5),
}
