"""Many seeds on several processors, and what they come to."""

import os
import pickle
import resource
import time
from collections.abc import Callable, Sequence

from blake3 import blake3

from tools.simulation.run import Outcome, simulate, the_stage


def run_seeds(
    first: int,
    count: int,
    jobs: int = 2,
    deadline_s: float | None = None,
    seeded_fault: str | None = None,
    *,
    stop: bool = False,
) -> list[Outcome]:
    """Outcomes of `count` seeds from `first` on, or of those that began before `deadline_s` (on
    time.monotonic()); each processor takes every `jobs`-th one. `seeded_fault`: the name of one
    that the product is given first. `stop`: each processor stops at its first broken promise."""
    the_stage()  # once, for all
    children = [
        _fork(range(first + job, first + count, jobs), deadline_s, seeded_fault, stop=stop)
        for job in range(jobs)
    ]
    outcomes: list[Outcome] = []
    for process, reader in children:
        with os.fdopen(reader, "rb") as pipe:
            received = pipe.read()
        _, status = os.waitpid(process, 0)
        if status or not received:
            raise RuntimeError(f"a process of the simulation ended with status {status}")
        outcomes += pickle.loads(received)
    return sorted(outcomes, key=lambda outcome: outcome.seed)


def broken_by(name: str | None) -> Callable[[], None] | None:
    """What puts a seeded fault into the product before each run. A fault that replaces system
    calls does so each time anew, any other once."""
    if name is None:
        return None
    calls = ("fsync", "fdatasync", "write", "pwrite", "open", "unlink")
    is_done = False

    def fault() -> None:
        nonlocal is_done
        before = [getattr(os, call) for call in calls]
        if not is_done:
            apply(name)
            is_done = before == [getattr(os, call) for call in calls]

    from tools.faults.seeded import apply

    return fault


def _fork(
    seeds: Sequence[int], deadline_s: float | None, seeded_fault: str | None, *, stop: bool
) -> tuple[int, int]:
    reader, writer = os.pipe()
    process = os.fork()
    if process:
        os.close(writer)
        return process, reader
    status = 1
    try:
        os.close(reader)
        outcomes = []
        fault = broken_by(seeded_fault)
        if fault is not None:  # some keep files open
            most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
        for seed in seeds:
            if deadline_s is not None and time.monotonic() > deadline_s:
                break
            outcomes.append(simulate(seed, fault=fault))
            if stop and outcomes[-1].problems:
                break
        with os.fdopen(writer, "wb") as pipe:
            pipe.write(pickle.dumps(outcomes))
        status = 0
    finally:
        os._exit(status)


def counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """What happened in all runs together."""
    return {
        "commands": sum(outcome.invocations for outcome in outcomes),
        "acknowledged": sum(outcome.acknowledged for outcome in outcomes),
        "commands cut": sum(outcome.unknown for outcome in outcomes),
        "power cuts": sum(outcome.cuts for outcome in outcomes),
        "failed calls": sum(outcome.failed_calls for outcome in outcomes),
        "steps": sum(outcome.steps for outcome in outcomes),
    }


def digest(outcomes: Sequence[Outcome]) -> str:
    """Of all event logs of all runs: the same for the same seeds."""
    return blake3("".join(o.history_hash for o in outcomes).encode()).hexdigest()[:16]


def summary(outcomes: Sequence[Outcome]) -> str:
    """One line."""
    told = ", ".join(f"{number:,} {name}" for name, number in counts(outcomes).items())
    cpu_s = sum(outcome.cpu_s for outcome in outcomes)
    return (
        f"{len(outcomes)} runs, {sum(bool(o.problems) for o in outcomes)} with problems; {told}; "
        f"{1000 * cpu_s / max(1, len(outcomes)):.0f} ms of CPU a run; logs {digest(outcomes)}"
    )
