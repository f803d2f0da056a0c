"""Sweeping: packs without the records that nothing needs (protocol/PACKS.md 9).

A pack worth it is written anew with what is to stay of it, verbatim. A record that stays and whose
base goes is stored in another form: on a relative of its base that stays, or alone, unless keeping
the base takes less (decisions/0011). Bases that packs need which stay as they are stay too.

What is prepared here takes nobody's way: temporary files. `PreparedSweep.finish` is the moment in
which objects go, and its caller holds the dot alone.
"""

import os
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

from dmsync.core.delta import compress
from dmsync.core.ids import Kind
from dmsync.core.records import (
    HEADER_BYTES_MAX,
    Record,
    encode_record,
    encode_varint,
    parse_header,
)
from dmsync.errors import BadObject, Corruption
from dmsync.storage.durable import fsync_directory, storage_errors
from dmsync.storage.pack_consolidation import TEMPORARY_PREFIX
from dmsync.storage.packs import (
    ENVELOPE_BYTES,
    HEADER_BYTES,
    PACK_BYTES_MAX,
    Footer,
    PackBuilder,
    PackInfo,
    Place,
    pack_hash_matches,
    read_footer,
)

if TYPE_CHECKING:
    from dmsync.storage.object_store import ObjectStore

SMALL_PACK_BYTES: Final = 1024 * 1024
"""A pack below this is written anew for any garbage: that costs no more than a few commits do."""
GARBAGE_SHARE: Final = 0.1
"""Of a larger pack: what has to be garbage for its other nine tenths to be copied."""
_BLOCK_BYTES: Final = 64 * 1024
_COPY_BYTES: Final = 4 * 1024 * 1024
_LARGE_RECORDS_BYTES: Final = 16 * 1024
"""Headers of records of this size on average are read one by one."""

IsLive = Callable[[bytes], bool]
"""Is anything with this short key needed?"""


class Entry(NamedTuple):
    """A record: its pack's number in the survey, where it begins and how long it is."""

    pack: int
    offset: int
    length: int


class Edge(NamedTuple):
    """A record with dead bases."""

    key: bytes
    entry: Entry
    bases: tuple[bytes, ...]


@dataclass
class Survey:
    """What lies in a dot's packs: dead records, who is based on them, what is there twice."""

    packs: list[PackInfo] = field(default_factory=list)
    dead: dict[bytes, list[Entry]] = field(default_factory=dict)
    edges: dict[int, list[Edge]] = field(default_factory=dict)
    """By pack: records, dead or not, that are based on dead ones."""
    bases: dict[bytes, tuple[bytes, ...]] = field(default_factory=dict)
    """Dead bases of dead records, of all copies together."""
    repeated: set[bytes] = field(default_factory=set)
    """Live keys with several records."""
    instead: dict[Entry, list[Entry]] = field(default_factory=dict)
    """Of those records, each of which others can take the place, whatever else goes: all that can,
    itself perhaps among them."""
    objects: int = 0
    dead_commits: list[Entry] = field(default_factory=list)

    def names(self) -> set[str]:
        return {pack.name for pack in self.packs}

    def garbage_bytes(self) -> list[int]:
        """Of each pack, the bytes of its dead records."""
        found = [0] * len(self.packs)
        for entries in self.dead.values():
            for entry in entries:
                found[entry.pack] += entry.length
        for entry, others in self.instead.items():
            if entry != others[0]:
                found[entry.pack] += entry.length
        return found


def survey(objects: "ObjectStore", is_live: IsLive) -> Survey:
    """Look at the tables of all packs, and at the headers of all records if any of them is dead.

    Raises:
        Corruption: a pack cannot be read, or is being replaced by another process.
    """
    found = Survey(objects.packs())
    for number, pack in enumerate(found.packs):
        with OpenPack(objects, pack.name) as opened:
            found.objects += pack.records
            for key, entry in opened.entries(number):
                if not is_live(key):
                    found.dead.setdefault(key, []).append(entry)
    if found.dead:
        for number, pack in enumerate(found.packs):
            with OpenPack(objects, pack.name) as opened:
                for edge in opened.edges(number, found.dead, found.dead_commits):
                    found.edges.setdefault(number, []).append(edge)
                    if edge.key in found.dead:
                        known = found.bases.get(edge.key, ())
                        found.bases[edge.key] = (*known, *edge.bases)
    _find_copies(objects, found, is_live)
    return found


def _find_copies(objects: "ObjectStore", found: Survey, is_live: IsLive) -> None:
    """Live objects stored several times. One record that stands alone is enough: whatever is based
    on the object can be decoded with it, and in no more steps. Of several with bases none may go,
    unless they are the same: the one kept may be based on something that was based on the other."""
    numbers = {pack.name: number for number, pack in enumerate(found.packs)}
    for key in objects.sealed.index.duplicates():
        if not is_live(key):
            continue
        found.repeated.add(key)
        by_form: dict[Record, list[Entry]] = {}
        for place, record in objects.sound_copies(key):
            if place.pack in numbers:
                length = len(encode_record(record))
                entry = Entry(numbers[place.pack], place.offset, length)
                by_form.setdefault(record, []).append(entry)
        alone = [entry for form, same in by_form.items() if not form.bases for entry in same]
        for same in by_form.values():
            found.instead.update(dict.fromkeys(same, alone or same))


class OpenPack:
    """A sealed pack for going through its records; a context manager. Raises Corruption."""

    def __init__(self, objects: "ObjectStore", name: str) -> None:
        self.name = name
        path = os.path.join(objects.sealed.directory, name)
        with storage_errors(f"opening pack {name}"):
            try:
                self.fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError as exc:
                raise Corruption(f"pack {name} is missing", pack=name) from exc
        try:
            with storage_errors(f"reading pack {name}"):
                self.footer, _ = read_footer(self.fd, name)
        except BaseException:
            os.close(self.fd)
            raise

    def __enter__(self) -> "OpenPack":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    def entries(self, number: int) -> Iterator[tuple[bytes, Entry]]:
        """Key and place of each record; `number` is the pack's own."""
        ends = [*self.footer.offsets[1:], self.footer.records_end]
        for key, start, end in zip(self.footer.keys, self.footer.offsets, ends, strict=True):
            yield key, Entry(number, start, end - start)

    def is_sound(self) -> bool:
        """Has the file the hash that it states? False also where the disk cannot read it."""
        try:
            return pack_hash_matches(self.fd, self.name)
        except OSError:
            return False

    def records(self, start: int, end: int) -> bytes:
        """What lies between two offsets, all of it. Raises Corruption, StorageFailed."""
        with storage_errors(f"reading pack {self.name}"):
            data = os.pread(self.fd, end - start, start)
        if len(data) != end - start:
            raise Corruption(
                f"pack {self.name}: it ends at {start + len(data)}", pack=self.name, offset=start
            )
        return data

    def edges(
        self, number: int, dead: dict[bytes, list[Entry]], dead_commits: list[Entry] | None = None
    ) -> Iterator[Edge]:
        """The records that have bases in `dead`; those of dead commits are listed."""
        count = len(self.footer.offsets)
        span = self.footer.records_end - HEADER_BYTES
        block_bytes = _BLOCK_BYTES if span < _LARGE_RECORDS_BYTES * count else HEADER_BYTES_MAX
        block, block_at = b"", 0
        for key, entry in self.entries(number):
            needed = min(HEADER_BYTES_MAX, entry.length)
            if not block_at <= entry.offset <= block_at + len(block) - needed:
                block_at = entry.offset
                with storage_errors(f"reading pack {self.name}"):
                    block = os.pread(self.fd, block_bytes, block_at)
            try:
                record, _, _ = parse_header(block, entry.offset - block_at)
            except BadObject as exc:
                raise Corruption(
                    f"pack {self.name}: no record at {entry.offset}: {exc.message}",
                    pack=self.name,
                    offset=entry.offset,
                ) from exc
            if record.kind is Kind.COMMIT and dead_commits is not None and key in dead:
                dead_commits.append(entry)
            bases = tuple({base.key for base in record.bases if base.key in dead})
            if bases:
                yield Edge(key, entry, bases)


@dataclass
class SweepPlan:
    """Which packs are written anew, and what is to stay of them though nothing live needs it."""

    survey: Survey
    rewritten: set[int]
    needed: set[bytes]
    """Dead records that stay, every copy of them: bases in what stays as it is."""
    damaged: set[int] = field(default_factory=set)
    """Packs that stay because of that: what is in them replaces nothing."""
    is_limited: bool = False
    """Was something left that is worth it, for want of room?"""

    def is_going(self, key: bytes) -> bool:
        """Will a record of this key go, though nothing takes its place? A copy that is left in a
        pack that stays may be a damaged one: nobody has looked."""
        entries = self.survey.dead.get(key, ())
        return key not in self.needed and any(entry.pack in self.rewritten for entry in entries)

    def stays(self, key: bytes, entry: Entry) -> bool:
        """Will there be this record of one of the packs that are written anew, in whatever form?"""
        if key in self.survey.dead:
            return key in self.needed
        others = self.survey.instead.get(entry, ())
        sound = [other for other in others if other.pack not in self.damaged]
        if not sound:
            return True
        return entry == sound[0] and all(other.pack in self.rewritten for other in sound)

    def keep(self, keys: Iterable[bytes]) -> None:
        """Let dead records stay, with what they are based on."""
        waiting = list(keys)
        while waiting:
            key = waiting.pop()
            if key in self.survey.dead and key not in self.needed:
                self.needed.add(key)
                waiting.extend(self.survey.bases.get(key, ()))

    def keeping_bytes(self, keys: Iterable[bytes]) -> int:
        """What `keep` would cost."""
        waiting, seen, total = list(keys), set(), 0
        while waiting:
            key = waiting.pop()
            if key not in seen and self.is_going(key):
                seen.add(key)
                copies = self.survey.dead[key]
                total += sum(entry.length for entry in copies if entry.pack in self.rewritten)
                waiting.extend(self.survey.bases.get(key, ()))
        return total


def plan_sweep(found: Survey, *, copied_bytes_max: int, untouched: set[int]) -> SweepPlan:
    """Choose the packs to write anew: those with enough garbage in them, or that keep enough of it
    from going elsewhere, as far as `copied_bytes_max` allows copying; never those `untouched`,
    which are damaged."""
    garbage = found.garbage_bytes()
    plan = SweepPlan(found, set(), set(), untouched)
    stays = [pack.bytes - spent for pack, spent in zip(found.packs, garbage, strict=True)]
    order = sorted(range(len(found.packs)), key=stays.__getitem__)
    copied = 0
    extra: dict[int, int] = {}
    while True:
        chosen: list[int] = []
        plan.is_limited = False
        for number in order:
            if number in plan.rewritten or number in untouched:
                continue
            total = garbage[number] + extra.get(number, 0)
            is_free = garbage[number] >= _records_bytes(found.packs[number])
            fits = is_free or copied + stays[number] <= copied_bytes_max
            if not _is_worth_it(found.packs[number], total):
                continue
            if not fits:
                plan.is_limited = True
                continue
            chosen.append(number)
            copied += 0 if is_free else stays[number]
        if not chosen:
            break
        plan.rewritten.update(chosen)
        plan.needed = _needed_elsewhere(plan)
        extra = _kept_by_pack(plan)
    return plan


def _records_bytes(pack: PackInfo) -> int:
    """What the records of a pack take at the least: the rest is header, table and trailer."""
    return pack.bytes - ENVELOPE_BYTES - 14 * pack.records


def _is_worth_it(pack: PackInfo, garbage_bytes: int) -> bool:
    if not garbage_bytes:
        return False
    return pack.bytes < SMALL_PACK_BYTES or garbage_bytes >= GARBAGE_SHARE * pack.bytes


def _needed_elsewhere(plan: SweepPlan) -> set[bytes]:
    fresh = SweepPlan(plan.survey, plan.rewritten, set())
    for number, edges in plan.survey.edges.items():
        if number not in plan.rewritten:
            for edge in edges:
                fresh.keep(edge.bases)
    return fresh.needed


def _kept_by_pack(plan: SweepPlan) -> dict[int, int]:
    """Of each pack that stays, the bytes elsewhere that could go if it did not."""
    alone = SweepPlan(plan.survey, plan.rewritten, set())
    return {
        number: sum(alone.keeping_bytes(edge.bases) for edge in edges)
        for number, edges in plan.survey.edges.items()
        if number not in plan.rewritten
    }


class NewPacks:
    """What a sweep writes: temporary packs, or only their sizes. Use `close` whatever happens."""

    def __init__(self, objects: "ObjectStore", *, is_dry: bool) -> None:
        self._objects = objects
        self._is_dry = is_dry
        self._builders: list[PackBuilder] = []
        self._lengths: list[array[int]] = []
        self._size = PACK_BYTES_MAX
        self.names: list[str] = []

    def append_joined(self, data: bytes, lengths: list[int], keys: list[bytes]) -> None:
        """Add records that lie one behind the other. Raises StorageFull, StorageFailed."""
        if self._size >= PACK_BYTES_MAX:
            self._lengths.append(array("I"))
            self._size = HEADER_BYTES
            if not self._is_dry:
                directory, dot = self._objects.sealed.directory, self._objects.dot_id
                builder = PackBuilder.create(directory, TEMPORARY_PREFIX, "", dot)
                self._builders.append(builder)
        self._lengths[-1].extend(lengths)
        self._size += len(data)
        if not self._is_dry:
            self._builders[-1].append_joined(data, lengths, keys)

    def total_bytes(self) -> int:
        """Bytes of the packs once they are sealed."""
        return sum(_sealed_bytes(lengths) for lengths in self._lengths)

    def sync(self) -> None:
        """Have on the disk what was written: sealing has little to do then."""
        for builder in self._builders:
            builder.sync()

    def seal(self) -> list[tuple[PackInfo, Footer]]:
        """Give the packs their names, durably. Raises StorageFull, StorageFailed."""
        directory = self._objects.sealed.directory
        sealed = []
        while self._builders:
            builder = self._builders[0]
            info = builder.finish()
            with self._objects.lock:
                self._objects.sealed.index.name_file(builder.path, info.name)
            sealed.append((info, builder.footer()))
            builder.close()
            del self._builders[0]
        if sealed:
            fsync_directory(directory)
        self.names = [info.name for info, _ in sealed]
        return sealed

    def close(self) -> None:
        """Remove what was not sealed."""
        while self._builders:
            self._builders.pop().discard()


def _sealed_bytes(lengths: "array[int]") -> int:
    table = b"".join(map(encode_varint, lengths))
    return ENVELOPE_BYTES + sum(lengths) + len(compress(table)) + 8 * len(lengths)


@dataclass
class PreparedSweep:
    """A sweep of which only the last step is left. Close it.

    `objects` and `freed_bytes` are what it frees; `reencoded` records get another form."""

    plan: SweepPlan
    store: "ObjectStore"
    packs: NewPacks
    objects: int = 0
    freed_bytes: int = 0
    reencoded: int = 0

    def fits(self, live_since: Iterable[bytes]) -> bool:
        """Is nothing going that was stored on or became live since it was planned? Renews what is
        known of the packs. The caller holds the dot alone. Raises Corruption."""
        plan, found = self.plan, self.plan.survey
        if any(plan.is_going(key) for key in live_since):
            return False
        now = {pack.name for pack in self.store.packs()}
        if not {found.packs[number].name for number in plan.rewritten} <= now:
            return False
        for name in now - found.names():
            with OpenPack(self.store, name) as opened:
                for edge in opened.edges(0, found.dead):
                    if any(map(plan.is_going, edge.bases)):
                        return False
        return True

    def finish(self) -> None:
        """Let it go: new packs durable, then the index, then the old files.

        Raises:
            StorageFull, StorageFailed: nothing is lost; what was sealed may be there twice.
        """
        found = self.plan.survey
        gone = [found.packs[number].name for number in sorted(self.plan.rewritten)]
        sealed = self.packs.seal()
        self.store.sweep(sealed, [name for name in gone if name not in self.packs.names])

    def close(self) -> None:
        self.packs.close()


def prepare_sweep(
    objects: "ObjectStore",
    found: Survey,
    is_live: IsLive,
    *,
    copied_bytes_max: int,
    is_dry: bool = False,
) -> PreparedSweep | None:
    """Write what stays of the packs that go; None when there is nothing to be gained.

    Raises:
        Corruption: a record that stays cannot be read. StorageFull, StorageFailed.
    """
    verified: dict[int, bool] = {}
    while True:
        untouched = {number for number, sound in verified.items() if not sound}
        plan = plan_sweep(found, copied_bytes_max=copied_bytes_max, untouched=untouched)
        if not plan.rewritten:
            return None
        if _verify(objects, plan, verified):
            packs = NewPacks(objects, is_dry=is_dry)
            prepared = _written(objects, plan, is_live, packs, verified)
            if prepared is not None:
                break
    if prepared.freed_bytes <= 0:
        packs.close()
        return None
    return prepared


def _verify(objects: "ObjectStore", plan: SweepPlan, verified: dict[int, bool]) -> bool:
    """Is every pack sound of which anything is to be copied? A copy would bless the damage with a
    new hash."""
    asked = plan.rewritten - _emptied(plan)
    for number in asked - verified.keys():
        with OpenPack(objects, plan.survey.packs[number].name) as opened:
            verified[number] = opened.is_sound()
    return all(verified[number] for number in asked)


def _written(
    objects: "ObjectStore",
    plan: SweepPlan,
    is_live: IsLive,
    packs: NewPacks,
    verified: dict[int, bool],
) -> PreparedSweep | None:
    """Write what stays; None, with nothing written, when some of that lies in a damaged pack."""
    from dmsync.storage.pack_reencoding import Reencoding

    try:
        prepared = PreparedSweep(plan, objects, packs)
        renewed = Reencoding(objects, plan, is_live, packs).run()
        if not _verify(objects, plan, verified):  # bases were kept of packs that were to go whole
            packs.close()
            return None
        prepared.reencoded = len(renewed)
        for number in sorted(plan.rewritten):
            prepared.objects += _copy_survivors(objects, plan, number, renewed, packs)
        old_bytes = sum(plan.survey.packs[number].bytes for number in plan.rewritten)
        prepared.freed_bytes = old_bytes - packs.total_bytes()
        packs.sync()
    except BaseException:
        packs.close()
        raise
    return prepared


def _emptied(plan: SweepPlan) -> set[int]:
    """The packs of which no record stays."""
    leaving = dict.fromkeys(plan.rewritten, 0)
    for key, entries in plan.survey.dead.items():
        if key not in plan.needed:
            for entry in entries:
                if entry.pack in leaving:
                    leaving[entry.pack] += 1
    return {n for n, count in leaving.items() if count == plan.survey.packs[n].records}


def _copy_survivors(
    objects: "ObjectStore",
    plan: SweepPlan,
    number: int,
    renewed: set[bytes],
    packs: NewPacks,
) -> int:
    """Copy the records of a pack that stay as they are; returns how many do not stay."""
    dropped = 0
    run: list[tuple[bytes, Entry]] = []

    def flush() -> None:
        if run:
            start = run[0][1].offset
            data = opened.records(start, run[-1][1].offset + run[-1][1].length)
            packs.append_joined(data, [e.length for _, e in run], [key for key, _ in run])
            run.clear()

    with OpenPack(objects, plan.survey.packs[number].name) as opened:
        held = 0
        for key, entry in opened.entries(number):
            if not plan.stays(key, entry):
                dropped += 1
                continue
            if key in renewed:
                continue
            if run and (
                run[-1][1].offset + run[-1][1].length != entry.offset or held > _COPY_BYTES
            ):
                flush()
                held = 0
            run.append((key, entry))
            held += entry.length
        flush()
    return dropped


def place_of(found: Survey, entry: Entry) -> Place:
    return Place(found.packs[entry.pack].name, entry.offset)
