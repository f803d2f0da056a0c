"""Recorded sessions told again with a byte changed, cut, and with frames lost, doubled, exchanged.

Each try has to end in a typed error or in exactly what the unchanged session gives. A byte of a
name or a number of the request itself makes another request, as SSH would not let happen: then what
refs name must still be whole, by hash, and nothing that was not said.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import pairwise

from tools.faults.recorded_sessions import DIRECTIONS, Recording, Replay, hurried, record
from tools.faults.row import Budget, Row

_CLEAN_EVERY = 25
"""After so many tries the unchanged session is told to the store with all they left behind."""

Case = tuple[str, bytes]
"""(what was changed, the bytes to tell)."""


def run(budget: Budget) -> list[Row]:
    """A row of flips, one of cuts, one of frames; the count is of flips in all directions."""
    repeat = f"python -m tools.faults flips --seed {budget.seed}"
    count = f" --count {budget.count}" if budget.count is not None else " --long"
    rows = [
        Row("flips", "flipped bytes", budget.seed, repeat + count),
        Row("truncations", "cut sessions", budget.seed, repeat + count),
        Row("frames", "lost, doubled, exchanged", budget.seed, repeat + count),
    ]
    kinds: list[Callable[[Recording, Budget], Iterator[Case]]] = [flipped, truncated, reframed]
    share = None if budget.count is None else max(1, budget.count // len(DIRECTIONS))
    for direction in DIRECTIONS:
        recording = record(os.path.join(budget.directory, "made"), direction, budget.seed)
        for row, kind in zip(rows, kinds, strict=True):
            _try_all(row, recording, list(kind(recording, budget)), share, budget)
    return rows


def _try_all(
    row: Row, recording: Recording, cases: list[Case], share: int | None, budget: Budget
) -> None:
    rng = budget.random(row.name, recording.direction)
    if share is not None and len(cases) > share:
        cases = rng.sample(cases, share)
    replay = Replay(recording, budget.directory)
    ends: Counter[str] = Counter()
    for number, (what, said) in enumerate(cases, 1):
        # what came whole stays in quarantine for the try after, as with real retries
        with hurried():
            end, why = replay.tell(said, keep_quarantine=number % _CLEAN_EVERY != 0)
        row.tried += 1
        ends[end] += 1
        if end == "LOST":
            row.lost(f"{recording.direction}: {what}: {why}")
        if number % _CLEAN_EVERY == _CLEAN_EVERY - 1 or number == len(cases):
            _tell_cleanly(row, replay, recording)
    replay.close()
    for end, count in ends.items():
        row.counts[end] = int(row.counts.get(end, 0)) + count


def _tell_cleanly(row: Row, replay: Replay, recording: Recording) -> None:
    """Nothing that broken sessions left may stand in the way of a whole one."""
    end, why = replay.tell_cleanly()
    row.counts["clean"] = int(row.counts.get("clean", 0)) + 1
    if end != "same":
        row.lost(f"{recording.direction}: the unchanged session gives {end}: {why}")


def flipped(recording: Recording, budget: Budget) -> Iterator[Case]:
    """Every byte with one bit changed, and with all."""
    rng = budget.random("bits", recording.direction)
    said = recording.said
    for at in range(len(said)):
        for mask in (1 << rng.randrange(8), 0xFF):
            changed = bytes((said[at] ^ mask,))
            yield f"byte {at} xor {mask:#x}", said[:at] + changed + said[at + 1 :]


def truncated(recording: Recording, budget: Budget) -> Iterator[Case]:
    """Every beginning, and noise after the end or instead of the rest."""
    rng = budget.random("noise", recording.direction)
    said = recording.said
    for at in range(len(said)):
        yield f"cut at {at}", said[:at]
    for at in recording.frame_starts():
        yield f"noise after {at}", said[:at] + rng.randbytes(200)
    yield "noise at the end", said + rng.randbytes(5000)


def reframed(recording: Recording, budget: Budget) -> Iterator[Case]:
    """Each frame lost, doubled, exchanged with each other one."""
    starts, said = recording.frame_starts(), recording.said
    frames = [said[a:b] for a, b in pairwise(starts)]
    head = said[: starts[0]]
    for n in range(len(frames)):
        yield f"frame {n} lost", head + b"".join(frames[:n] + frames[n + 1 :])
        yield f"frame {n} doubled", head + b"".join(frames[: n + 1] + frames[n:])
        for m in range(n):
            exchanged = list(frames)
            exchanged[n], exchanged[m] = frames[m], frames[n]
            yield f"frames {m} and {n} exchanged", head + b"".join(exchanged)
