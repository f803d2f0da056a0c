"""Repair of what a store cannot be opened without: `format` and the event log.

One flipped bit is found by trying: the chain hash says which. Anything else ends the log where it
can be verified; the rest goes to `damaged`, a new epoch begins there, and what the catalog knew is
put back (recovered_state). What is lost is noted before the cut: a stop in between hides nothing.
"""

import os
from collections.abc import Iterator
from typing import Final

from dmsync.core.events import UNIQUE_ID_BYTES, EpochStarted, Event, Operation, StoreCreated
from dmsync.engine.repairing.losses import Loss, Report, add_losses
from dmsync.errors import Corruption, StoreNotFound
from dmsync.storage.durable import (
    fsync_directory,
    make_directory_durable,
    storage_errors,
    write_file_atomic,
)
from dmsync.storage.event_log import (
    SEGMENT_HEADER_BYTES,
    START,
    EventLog,
    Position,
    chain,
    encode_log_record,
    encode_record_prefix,
    encode_segment_header,
    parse_record_prefix,
    segment_name,
    segment_number,
)
from dmsync.storage.layout import FORMAT_VERSION, Format, Layout
from dmsync.storage.locks import FileLock

HASHED_BYTES_MAX: Final = 1 << 33
"""What the search for one bit hashes at most: some seconds, for a record of 32 KiB."""
FLIPS_MAX: Final = 4096
_HASH_AT: Final = 8
_PAYLOAD_AT: Final = 40
UNKNOWN: Final = "no catalog knows what the log lost"


def repair_log(home: str, report: Report, *, lock_wait_s: float, dry_run: bool) -> bool:
    """Make format and log of the store at `home` such that it opens; True when the log was cut.

    Raises:
        StoreNotFound: there is none. Busy. FormatUnsupported: a newer dmsync's. StorageFailed.
    """
    layout = Layout(home)
    _refuse_newer(layout)
    if not os.path.isdir(layout.events_dir):
        layout.read_format()  # raises StoreNotFound when this is no store at all
        if not dry_run:
            make_directory_durable(layout.events_dir)
    with FileLock(layout.log_lock_file, what="the event log", wait_s=lock_wait_s):
        was_cut = _LogRepair(layout, report, dry_run=dry_run).run()
        _repair_format(layout, report, dry_run=dry_run)
    return was_cut


def _refuse_newer(layout: Layout) -> None:
    """What a newer dmsync wrote may look like damage."""
    try:
        layout.read_format().check(writing=True)
    except (StoreNotFound, Corruption):
        return  # told or written again below


def _repair_format(layout: Layout, report: Report, *, dry_run: bool) -> None:
    """The log has been read to its end by now: this release knows all there is in it."""
    try:
        layout.read_format()
        return
    except StoreNotFound:
        if not layout.holds_something():
            raise
        why = "is missing"
    except Corruption:
        why = "is damaged"
    report.did("", "format", f"{why}; written again, for version {FORMAT_VERSION}")
    if not dry_run:
        write_file_atomic(layout.format_file, Format(FORMAT_VERSION).to_bytes())


class _LogRepair:
    def __init__(self, layout: Layout, report: Report, *, dry_run: bool) -> None:
        self._layout = layout
        self._report = report
        self._dry_run = dry_run
        self._log = EventLog(layout.events_dir)

    def run(self) -> bool:
        for _ in range(FLIPS_MAX):
            position, damage = self._verified()
            if damage is None:
                if position == START and self._has_lost_all():
                    self._begin_anew()
                    return True
                return False
            segment, offset = segment_number(damage), damage.facts.get("offset")
            if not isinstance(offset, int) or not self._correct(segment, offset, position):
                self._cut(segment, offset if isinstance(offset, int) else 0, position, damage)
                return True
            if self._dry_run:
                return False
        return False

    def _verified(self) -> tuple[Position, Corruption | None]:
        """How far the log can be believed, and what ends it."""
        position = START
        try:
            for _, reached in self._log.read():
                position = reached
        except Corruption as exc:
            if "segment" not in exc.facts:
                raise
            if position == START and "offset" not in exc.facts:  # one is missing between others
                before = _LogBefore(self._layout.events_dir, segment_number(exc))
                for _, reached in before.read():
                    position = reached
            return position, exc
        return position, None

    def _has_lost_all(self) -> bool:
        return not self._log.segments() and self._layout.holds_something()

    def _path(self, segment: int) -> str:
        return os.path.join(self._layout.events_dir, segment_name(segment))

    # --- one bit ------------------------------------------------------------------------------

    def _correct(self, segment: int, offset: int, before: Position) -> bool:
        """Write what the bytes at `offset` must have been, if that can be told for certain."""
        try:
            with storage_errors(f"reading {self._path(segment)}"):
                with open(self._path(segment), "rb") as file:
                    content = file.read()
        except FileNotFoundError:
            return False
        if offset < SEGMENT_HEADER_BYTES:
            right = encode_segment_header(segment, before)
            if _differing_bits(content[:SEGMENT_HEADER_BYTES], right) > 8:
                return False
            offset = 0
        else:
            found = corrected_record(content, offset, segment, before.chain_hash)
            if found is None:
                return False
            right = found
        name = segment_name(segment)
        self._report.did("", f"events/{name}", f"a flipped bit behind offset {offset} corrected")
        if not self._dry_run:
            with storage_errors(f"correcting {name}"):
                fd = os.open(self._path(segment), os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
                try:
                    os.pwrite(fd, right, offset)
                    os.fsync(fd)
                finally:
                    os.close(fd)
        return True

    # --- cutting ------------------------------------------------------------------------------

    def _cut(self, segment: int, offset: int, before: Position, damage: Corruption) -> None:
        """Set aside what cannot be verified: from `offset` of `segment` on.

        Until the segment is replaced the log is as damaged as it was, and after it the segments
        behind do not follow: whoever comes in between repairs on.
        """
        what = f"{damage.message}; the log ends at event {before.last_seq} now"
        self._report.did("", "events", f"{what}, the rest is in damaged")
        if self._dry_run:
            return
        self._note(what, before)
        kept = _new_directory(self._layout, "events")
        if before == START:
            segment = 1
        numbers = self._numbers()
        sound = b""
        if segment in numbers:
            with (
                storage_errors(f"setting {segment_name(segment)} aside"),
                open(self._path(segment), "rb") as file,
            ):
                content = file.read()
            write_file_atomic(os.path.join(kept, segment_name(segment)), content)
            sound = content[:offset] if offset > SEGMENT_HEADER_BYTES else b""
        self._begin_epoch(segment, sound, before)
        for number in reversed([number for number in numbers if number > segment]):
            with storage_errors(f"setting {segment_name(number)} aside"):
                os.rename(self._path(number), os.path.join(kept, segment_name(number)))
        fsync_directory(kept)
        fsync_directory(self._layout.events_dir)

    def _note(self, what: str, before: Position) -> None:
        """That something is lost, and whether a catalog can tell what."""
        from dmsync.engine.repairing.recovered_state import is_known_past

        self._log.note_lost_end(what)
        if not is_known_past(self._layout, before.last_seq):
            add_losses(self._layout, [Loss("", "", "events", "", f"{what}; {UNKNOWN}")])

    def _numbers(self) -> list[int]:
        names = os.listdir(self._layout.events_dir)
        return sorted(int(name[:8]) for name in names if name[8:] == ".log" and name[:8].isdigit())

    def _begin_anew(self) -> None:
        """A log of its first event alone, for a store whose log is gone."""
        what = "the event log is gone: a new one begins"
        self._report.did("", "events", what)
        if self._dry_run:
            return
        self._note(what, START)
        self._begin_epoch(1, b"", START)

    def _begin_epoch(self, segment: int, sound: bytes, before: Position) -> None:
        """End the log with `segment`: what is `sound` of it, and the event of a new epoch, which
        is there as soon as the rest is not. Durable on return."""
        from time import time_ns

        from dmsync.engine.repairing.recovered_state import known_cluster_id

        epoch = int.from_bytes(os.urandom(6), "big")
        event: Event = EpochStarted(epoch)
        if before == START:
            cluster_id = known_cluster_id(self._layout) or os.urandom(UNIQUE_ID_BYTES)
            event = StoreCreated(cluster_id, epoch)
        op_id = os.urandom(UNIQUE_ID_BYTES)
        operation = Operation(before.last_seq + 1, time_ns(), op_id, "fsck --repair", "", (event,))
        sound = sound or encode_segment_header(segment, before)
        record = encode_log_record(operation, before, segment, len(sound))
        write_file_atomic(self._path(segment), sound + record)
        fsync_directory(self._layout.home)


class _LogBefore(EventLog):
    """The segments before one that is missing."""

    def __init__(self, directory: str, end: int) -> None:
        super().__init__(directory)
        self._names = os.listdir(directory)
        self._end = end

    def segments(self) -> list[int]:
        numbers = range(1, self._end)
        return [number for number in numbers if segment_name(number) in self._names]


def _new_directory(layout: Layout, what: str) -> str:
    number = 1
    while os.path.lexists(path := os.path.join(layout.damaged_dir, f"{what}-{number}")):
        number += 1
    make_directory_durable(path)
    return path


def corrected_record(content: bytes, offset: int, segment: int, before: bytes) -> bytes | None:
    """The record at `offset` as it was before one bit of it, or a few of one of its fields,
    changed; None when that cannot be told. `before` is the chain hash of what is before it."""
    prefix = content[offset : offset + _PAYLOAD_AT]
    if len(prefix) < _PAYLOAD_AT:
        return None
    stored = prefix[_HASH_AT:]
    for length in _lengths(prefix, segment, offset):
        payload = content[offset + _PAYLOAD_AT : offset + _PAYLOAD_AT + length]
        if not length or len(payload) != length:
            continue
        computed = chain(before, payload)
        if _differing_bits(computed, stored) > 8:
            found = _flipped_back(payload, before, stored)
            if found is None:
                continue
            payload, computed = found, stored
        return encode_record_prefix(segment, offset, length) + computed + payload
    return None


def _lengths(prefix: bytes, segment: int, offset: int) -> Iterator[int]:
    """Lengths that the record may have: the one it states, and those a bit away that its check
    confirms."""
    length = parse_record_prefix(prefix)
    yield length
    for bit in range(32):
        other = length ^ 1 << bit
        if encode_record_prefix(segment, offset, other)[4:] == prefix[4:_HASH_AT]:
            yield other


def _flipped_back(payload: bytes, before: bytes, stored: bytes) -> bytes | None:
    if 8 * len(payload) * (len(payload) + len(before)) > HASHED_BYTES_MAX:
        return None
    tried = bytearray(payload)
    for index in range(len(tried)):
        byte = tried[index]
        for bit in range(8):
            tried[index] = byte ^ 1 << bit
            if chain(before, bytes(tried)) == stored:
                return bytes(tried)
        tried[index] = byte
    return None


def _differing_bits(one: bytes, other: bytes) -> int:
    if len(one) != len(other):
        return 8 * max(len(one), len(other))
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_count()
