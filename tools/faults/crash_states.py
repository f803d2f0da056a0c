"""What a disk may hold after a loss of power: states made from the writes of a recorded session.

The last flush before the cut has made everything before it durable. Of what was written since, the
disk has any part: each write whole, torn between sectors, or not at all, in whatever order it liked
(so that a later one may be there without an earlier one). A disk that lies about its flushes has
any part of what was written since some flush before. An acknowledgement holds when its mark lies
before the cut: all that it needs was flushed before it was said.
"""

import hashlib
import json
import os
import random
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Final

from tools.faults.block_device import Happened, Record
from tools.faults.images import copy_sparse

SECTOR_BYTES: Final = 512
BLOCK_BYTES: Final = 4096
_AFTER_ACK_SHARE: Final = 0.2
_KEPT_SHARES: Final = (0.1, 0.3, 0.5, 0.7, 0.9)

Patch = tuple[int, bytes]


class Device(Enum):
    """What kind of disk loses power."""

    HONEST = "honest"
    LYING = "ignores flushes"
    STALE = "one block stale"
    MISDIRECTED = "one block misdirected"


@dataclass(frozen=True)
class CrashState:
    """The first `applied` records, and then `patches`. `cut`: how many records came before it."""

    cut: int
    applied: int
    patches: tuple[Patch, ...]


@dataclass
class Session:
    """Records of a session, what the disk held before, and what was said during it."""

    image: str
    records: list[Record]
    flushes: list[int] = field(default_factory=list)
    """Numbers of records that are flushes, ascending."""
    writes: list[int] = field(default_factory=list)
    acks: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for number, record in enumerate(self.records):
            if record.kind is Happened.FLUSH:
                self.flushes.append(number)
            elif record.kind is Happened.WRITE:
                self.writes.append(number)
            elif b'"begun"' not in record.data:
                self.acks.append(number)

    def messages(self, cut: int) -> Iterator[Any]:
        """What was said before the cut."""
        for record in self.records[:cut]:
            if record.kind is Happened.SAID:
                yield json.loads(record.data)

    def state(
        self, device: Device, rng: random.Random, *, ack_share: float = _AFTER_ACK_SHARE
    ) -> CrashState:
        """One of the states that a disk of that kind may be in; of the cuts `ack_share` come right
        after an acknowledgement."""
        if device in (Device.STALE, Device.MISDIRECTED):
            return self._wrong_block(device, rng)
        cut = rng.choice(self.writes) + rng.choice((0, 1, 1))
        if self.acks and rng.random() < ack_share:
            cut = rng.choice(self.acks) + 1
        flushed = bisect_right(self.flushes, cut - 1)
        if device is Device.LYING:
            flushed = rng.randrange(flushed) if flushed else 0
        applied = self.flushes[flushed - 1] + 1 if flushed else 0
        since = [record for record in self.records[applied:cut] if record.data and is_write(record)]
        return CrashState(cut, applied, tuple(_kept(since, rng)))

    def _wrong_block(self, device: Device, rng: random.Random) -> CrashState:
        """The disk is as at the end, but for one block that was written in the session."""
        end = len(self.records)
        offset, _ = rng.choice(_blocks(self.records[n] for n in self.writes))
        older = [block for place, block in self._history(offset)]
        if device is Device.STALE:
            return CrashState(end, end, ((offset, rng.choice(older[:-1] or [bytes(BLOCK_BYTES)])),))
        other, _ = rng.choice(_blocks(self.records[n] for n in self.writes))
        return CrashState(end, end, ((other, older[-1]),) if other != offset else ())

    def _history(self, offset: int) -> list[Patch]:
        """What the block at `offset` held, before the session and after each write."""
        with open(self.image, "rb") as file:
            file.seek(offset)
            history = [(offset, file.read(BLOCK_BYTES).ljust(BLOCK_BYTES, b"\0"))]
        for number in self.writes:
            history += [block for block in _blocks([self.records[number]]) if block[0] == offset]
        return history


def is_write(record: Record) -> bool:
    return record.kind is Happened.WRITE


def _blocks(records: Any) -> list[Patch]:
    """The whole blocks of writes."""
    found = []
    for record in records:
        first = -record.offset % BLOCK_BYTES
        for place in range(first, len(record.data) - BLOCK_BYTES + 1, BLOCK_BYTES):
            found.append((record.offset + place, record.data[place : place + BLOCK_BYTES]))
    return found


def _kept(writes: Sequence[Record], rng: random.Random) -> Iterator[Patch]:
    """What arrived of the writes since the last flush."""
    how = rng.choice(("all", "none", "some", "some", "some", "one missing", "only one"))
    share = rng.choice(_KEPT_SHARES)
    chosen = rng.randrange(len(writes)) if writes else -1
    torn = rng.randrange(len(writes)) if writes and rng.random() < 0.5 else -1
    for number, write in enumerate(writes):
        kept = {
            "all": True,
            "none": False,
            "some": rng.random() < share,
            "one missing": number != chosen,
            "only one": number == chosen,
        }[how]
        if number == torn:
            yield from _torn(write, rng)
        elif kept:
            yield write.offset, write.data


def _torn(write: Record, rng: random.Random) -> Iterator[Patch]:
    """Some sectors of a write: those before a place, those after it, or any."""
    sectors = range(0, len(write.data), SECTOR_BYTES)
    place = rng.randrange(len(sectors) + 1)
    how = rng.choice(("first", "last", "any"))
    for number, start in enumerate(sectors):
        before = number < place
        if {"first": before, "last": not before, "any": rng.random() < 0.5}[how]:
            yield write.offset + start, write.data[start : start + SECTOR_BYTES]


class StateMaker:
    """Writes states of one session into a file; cheap when they come in order of `applied`."""

    def __init__(self, session: Session, scratch: str) -> None:
        self._session = session
        self._prefix = scratch
        self._applied = 0
        self._digest = hashlib.blake2b(digest_size=16)
        copy_sparse(session.image, scratch)
        self._file = os.open(scratch, os.O_RDWR | os.O_CLOEXEC)

    def make(self, state: CrashState, target: str) -> str:
        """Make `target` hold the state; a digest of it, equal for states of equal bytes (nearly:
        two ways to the same bytes may differ in it)."""
        assert state.applied >= self._applied, "states come in order"
        for record in self._session.records[self._applied : state.applied]:
            if is_write(record):
                os.pwrite(self._file, record.data, record.offset)
                self._digest.update(b"%d:%d:" % (record.offset, len(record.data)) + record.data)
        self._applied = state.applied
        copy_sparse(self._prefix, target)
        sectors: dict[int, bytes] = {}
        with open(target, "r+b", buffering=0) as file:
            for offset, data in state.patches:
                os.pwrite(file.fileno(), data, offset)
                for start in range(0, len(data), SECTOR_BYTES):
                    sectors[offset + start] = data[start : start + SECTOR_BYTES]
        digest = self._digest.copy()
        for offset in sorted(sectors):
            before = os.pread(self._file, SECTOR_BYTES, offset)
            if before != sectors[offset]:
                digest.update(b"%d:" % offset + sectors[offset])
        return digest.hexdigest()

    def close(self) -> None:
        os.close(self._file)
