"""Walks a tree on several processes: threads would only take turns at the interpreter's lock.

The old cache says where the walk is halved: it is cut into ranges of about equal length in blocks,
each beginning at a directory. The directories above a cut are in the ranges on both sides; they
are listed once, before the processes part, and each range gets its own of their names. So every
directory is listed once, every name that was listed is walked by exactly one process, and the
result is that of one walk.

A worker is a fork that shares the cache's memory and hands its findings back in one piece. What it
cannot do (an error, another filesystem), or did not (it was killed), the calling process does
again itself: errors are met and typed there.

What the work keeps to is said in engine.forking; it opens no database either. A process with
threads that are not Python's, of which less is known, does not fork. A worker that were to hang all
the same is ended and its range walked here.
"""

import gc
import os
import select
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from dmsync.engine.forking import end, fork, knows_its_threads
from dmsync.storage.stat_cache import Block, StatCache

PROCESSES_MAX: Final = 8
RANGE_BYTES_MIN: Final = 1024 * 1024
"""Length of blocks from which a process of its own pays: some 15,000 names, 50 ms of walking,
where a fork and its end take 5 to 10 ms."""
_LENGTH_BYTES: Final = 8


class Seed(NamedTuple):
    """A directory that a range shares with those before it: its path in the tree, and the names of
    the directories in it that are the range's, in order."""

    below: bytes
    names: list[bytes]


@dataclass
class Range:
    """A run of the walk: blocks of the cache from the place `start` to before `end`, and the
    directories that lie there now. The default is all."""

    start: int = 0
    end: int | None = None
    seeds: list[Seed] = field(default_factory=list)
    """The directories above its first one, from the tree's root down."""
    stops: dict[bytes, bytes] = field(default_factory=dict)
    """For directories shared with the ranges after it: the first name that is theirs."""


def planned_ranges(
    cache: StatCache,
    prefix: bytes,
    *,
    processes_max: int | None,
    list_ahead: Callable[[bytes], list[bytes] | None],
) -> list[Range]:
    """Ranges that make up the walk, in its order; none when it is not worth cutting.

    `list_ahead` names the directories in the directory at a path in the tree, and keeps what it
    saw for the walk; None when it cannot.
    """
    wanted = min(processes_max or PROCESSES_MAX, len(os.sched_getaffinity(0)))
    if wanted < 2 or not knows_its_threads():
        return []
    ranges = [Range()]
    for block in _cuts(cache, wanted):
        stops = _stops(_inside(block.path, prefix), list_ahead)
        if stops is None:
            continue
        last = ranges[-1]
        last.end = block.place
        last.stops = {below: stop for below, stop, _ in stops}
        last.seeds = [_before(seed, last.stops.get(seed.below)) for seed in last.seeds]
        ranges.append(Range(block.place, None, [_from(*shared) for shared in stops]))
    return ranges if len(ranges) > 1 else []


def _cuts(cache: StatCache, wanted: int) -> list[Block]:
    """First blocks of directories that divide the cache in about equal lengths."""
    lengths = [cache.segment_bytes(position) for position in range(cache.segments_count)]
    wanted = min(wanted, sum(lengths) // RANGE_BYTES_MIN)
    cuts: list[Block] = []
    passed = 0
    for position, length in enumerate(lengths):
        if len(cuts) + 1 >= wanted:
            break
        if passed + length // 2 >= sum(lengths) * (len(cuts) + 1) // wanted:
            block = cache.first_of_directory(position)
            if block is not None:
                cuts.append(block)
        passed += length
    return cuts


def _inside(path: bytes, prefix: bytes) -> bytes:
    return path[len(prefix) + 1 :] if prefix else path


def _stops(
    below: bytes, list_ahead: Callable[[bytes], list[bytes] | None]
) -> list[tuple[bytes, bytes, list[bytes]]] | None:
    """(path, first name of the next range, names) of each directory above the one at `below`;
    None when the tree cannot be cut there."""
    if not below:
        return None
    parts = below.split(b"/")
    stops = []
    for depth, part in enumerate(parts):
        above = b"/".join(parts[:depth])
        names = list_ahead(above)
        if names is None:
            return None
        is_last = depth == len(parts) - 1
        if not is_last and part not in names:
            return None
        # What leads to the cut is walked before it: the next range begins right behind its name.
        stops.append((above, part if is_last else part + b"\0", names))
    return stops


def _before(seed: Seed, stop: bytes | None) -> Seed:
    return seed if stop is None else Seed(seed.below, [n for n in seed.names if n < stop])


def _from(below: bytes, stop: bytes, names: list[bytes]) -> Seed:
    return Seed(below, names[bisect_left(names, stop) :])


class Worker:
    """A forked process that does `work` and hands back the bytes it returns."""

    def __init__(self, work: Callable[[], bytes]) -> None:
        self._reader, writer = os.pipe()

        def hand_back() -> None:
            gc.disable()
            os.close(self._reader)
            data = work()
            for piece in (len(data).to_bytes(_LENGTH_BYTES, "big"), data):
                view = memoryview(piece)
                while view:
                    view = view[os.write(writer, view) :]

        try:
            self.process = fork(hand_back)
        except OSError:
            os.close(self._reader)
            raise
        finally:
            os.close(writer)

    def result(self, patience_s: float) -> bytes | None:
        """What `work` returned; None when it failed, or nothing comes for so long."""
        data = bytearray()
        ready = select.poll()
        ready.register(self._reader, select.POLLIN)
        while ready.poll(patience_s * 1000):
            piece = os.read(self._reader, 1024 * 1024)
            if not piece:
                break
            data += piece
        body = memoryview(data)[_LENGTH_BYTES:]
        if len(data) < _LENGTH_BYTES or int.from_bytes(data[:_LENGTH_BYTES], "big") != len(body):
            return None
        return bytes(body)

    def close(self) -> None:
        """End the process if it still runs, and leave nothing of it."""
        os.close(self._reader)
        end(self.process)
