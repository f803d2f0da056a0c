"""The append-only event log: the only truth about everything mutable (protocol/STORE.md 4).

A record is one operation, so an operation is in the log as a whole or not at all. Its fsync is the
acknowledgement. Reading never writes; `recover` and `append` need the log lock.
"""

import os
import re
from collections.abc import Iterator
from contextlib import closing
from itertools import pairwise
from typing import Final

from blake3 import blake3

from dmsync.core.encoding import decode, encode
from dmsync.core.events import Operation, operation_from_value
from dmsync.core.values import plain_value_type
from dmsync.errors import BadObject, Corruption, FormatUnsupported, StorageFailed
from dmsync.storage.durable import remove_if_there, storage_errors, write_file_atomic
from dmsync.storage.stages import stage

SEGMENT_BYTES_MAX: Final = 64 * 1024 * 1024
"""A segment that has reached this size gets no more records."""
RECORD_BYTES_MAX: Final = 256 * 1024 * 1024
"""Largest payload: an operation naming COMMITS_MAX commits."""

_MAGIC: Final = b"dmevents"
_VERSION: Final = 1
_HASH_BYTES: Final = 32
_CHECK_BYTES: Final = 4
_LENGTH_BYTES: Final = 4
_PREFIX_BYTES: Final = _LENGTH_BYTES + _CHECK_BYTES
_RECORD_HEADER_BYTES: Final = _PREFIX_BYTES + _HASH_BYTES
_SEGMENT_CHECK_BYTES: Final = 8
SEGMENT_HEADER_BYTES: Final = 64
_SECTOR_BYTES: Final = 512
"""Smallest unit a disk writes as a whole: what a torn append leaves unwritten, in whole sectors."""
_LOST_END_FILE: Final = "lost-end"
_SEGMENT_NAME: Final = re.compile(r"[0-9]{8}\.log", re.ASCII)
_CHAIN_CONTEXT: Final = "dmsync 2026-11-21 event chain v1"
_CHECK_CONTEXT: Final = "dmsync 2026-11-21 event length v1"
_SEGMENT_CONTEXT: Final = "dmsync 2026-11-21 event segment v1"


@plain_value_type
class Position:
    """The end of one record: everything up to `last_seq` lies before it. `record_offset` is where
    that record begins (0: there is none yet in this segment), `end_offset` where it ends."""

    segment: int
    record_offset: int
    end_offset: int
    last_seq: int
    chain_hash: bytes


START: Final = Position(1, 0, 0, 0, bytes(_HASH_BYTES))
"""Before the first record of a log."""


def segment_name(segment: int) -> str:
    return f"{segment:08}.log"


def encode_segment_header(segment: int, before: Position) -> bytes:
    """64 bytes: magic, version, number, first sequence number, chain hash before, check."""
    body = (
        _MAGIC
        + _VERSION.to_bytes(4, "big")
        + segment.to_bytes(4, "big")
        + (before.last_seq + 1).to_bytes(8, "big")
        + before.chain_hash
    )
    check = blake3(body, derive_key_context=_SEGMENT_CONTEXT).digest(_SEGMENT_CHECK_BYTES)
    return body + check


def _length_check(segment: int, offset: int, length: int) -> bytes:
    """Guards the length, so that a damaged one is never taken for a record cut short."""
    body = segment.to_bytes(4, "big") + offset.to_bytes(8, "big") + length.to_bytes(4, "big")
    return blake3(body, derive_key_context=_CHECK_CONTEXT).digest(_CHECK_BYTES)


def segment_number(damage: Corruption) -> int:
    """The segment that a Corruption of this module names."""
    return int(str(damage.facts["segment"])[:8])


def encode_record_prefix(segment: int, offset: int, length: int) -> bytes:
    """Length and check of a record, 8 bytes."""
    return length.to_bytes(_LENGTH_BYTES, "big") + _length_check(segment, offset, length)


def parse_record_prefix(prefix: bytes) -> int:
    """The length that a record states, whatever its check says."""
    return int.from_bytes(prefix[:_LENGTH_BYTES], "big")


def chain(previous: bytes, payload: bytes) -> bytes:
    """The chain hash of a record after one whose chain hash is `previous`."""
    return blake3(previous + payload, derive_key_context=_CHAIN_CONTEXT).digest()


def encode_log_record(operation: Operation, at: Position, segment: int, offset: int) -> bytes:
    """The bytes of `operation` as the record following `at`. Raises BadObject."""
    payload = encode(operation.to_value())
    if len(payload) > RECORD_BYTES_MAX:
        raise BadObject("the operation is too large for the event log", bytes=len(payload))
    length = len(payload)
    return b"".join(
        (
            length.to_bytes(_LENGTH_BYTES, "big"),
            _length_check(segment, offset, length),
            chain(at.chain_hash, payload),
            payload,
        )
    )


class _TornTail(Exception):
    """From `offset` on lies an append that was cut: never acknowledged."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset)
        self.offset = offset


class EventLog:
    """The log in `directory`. Holds no open file between calls."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._is_dead = False

    # --- reading --------------------------------------------------------------------------------

    def read(self, after: Position = START) -> Iterator[tuple[Operation, Position]]:
        """The operations after a position of this log, each with the position behind it.

        Ends before a torn tail. The last record may not be durable yet while a writer runs.

        Raises:
            Corruption: naming segment and offset.
            FormatUnsupported: an event of a newer dmsync.
        """
        try:
            for operation, position, _ in self._records(after):
                yield operation, position
        except _TornTail:
            return

    def operation_at(self, segment: int, offset: int) -> Operation:
        """The one operation whose record begins there; its place in the chain is not checked.

        Raises:
            Corruption: no whole record there.
        """
        with closing(_Segment(self._path(segment), segment)) as file:
            try:
                _, payload = file.record(offset, is_last=False)
            except _TornTail as exc:
                raise file.corruption(offset, "no record") from exc
            return file.operation(offset, payload)

    def holds(self, position: Position) -> bool:
        """True when the log has the record that `position` stands behind. O(1)."""
        if position == START:
            return True
        path = self._path(position.segment)
        if not os.path.exists(path):
            return False
        with closing(_Segment(path, position.segment)) as file:
            if position.end_offset > file.size:
                return False
            if position.record_offset == 0:
                return file.before_hash == position.chain_hash
            header = file.bytes_at(position.record_offset, _RECORD_HEADER_BYTES)
            return header[_PREFIX_BYTES:] == position.chain_hash

    def reaches_past(self, position: Position) -> bool:
        """True when there is something behind `position`, if only a torn tail. O(1)."""
        if os.path.exists(self._path(position.segment + 1)):
            return True
        try:
            size = os.stat(self._path(position.segment)).st_size
        except FileNotFoundError:
            return False
        return size > max(position.end_offset, SEGMENT_HEADER_BYTES)

    def segments(self) -> list[int]:
        """Numbers of the segments, ascending. Raises Corruption when one is missing."""
        with storage_errors(f"listing {self._directory}"):
            names = os.listdir(self._directory)
        numbers = sorted(int(name[:8]) for name in names if _SEGMENT_NAME.fullmatch(name))
        for expected, number in enumerate(numbers, numbers[0] if numbers else 1):
            if number != expected:
                raise Corruption(
                    f"event log segment {segment_name(expected)} is missing",
                    segment=segment_name(expected),
                )
        return numbers

    def _records(self, after: Position) -> Iterator[tuple[Operation, Position, bytes]]:
        """(operation, position behind it, its chain hash and payload as stored)."""
        numbers = [number for number in self.segments() if number >= after.segment]
        position = after
        for number in numbers:
            with closing(_Segment(self._path(number), number)) as file:
                if number > position.segment or position.end_offset == 0:
                    file.check_follows(position)
                    position = Position(
                        number, 0, SEGMENT_HEADER_BYTES, position.last_seq, position.chain_hash
                    )
                is_last = number == numbers[-1]
                while position.end_offset < file.size:
                    offset = position.end_offset
                    chain_hash, payload = file.record(offset, is_last=is_last)
                    if chain(position.chain_hash, payload) != chain_hash:
                        file.refuse_payload(offset, len(payload), is_last=is_last)
                    operation = file.operation(offset, payload)
                    if operation.first_seq != position.last_seq + 1:
                        raise file.corruption(offset, "sequence numbers do not follow")
                    end = offset + _RECORD_HEADER_BYTES + len(payload)
                    position = Position(number, offset, end, operation.last_seq, chain_hash)
                    yield operation, position, payload

    def lost_end(self) -> list[str]:
        """What note_lost_end was told, oldest first, until somebody removes `lost-end`."""
        path = os.path.join(self._directory, _LOST_END_FILE)
        with storage_errors(f"reading {path}"):
            try:
                with open(path, encoding="utf-8", errors="replace") as file:
                    return file.read().splitlines()
            except FileNotFoundError:
                return []

    def _path(self, segment: int) -> str:
        return os.path.join(self._directory, segment_name(segment))

    # --- writing, under the log lock ------------------------------------------------------------

    def recover(self, after: Position) -> Iterator[tuple[Operation, Position]]:
        """Like read, and puts the end in order before the last operation is given out.

        A torn tail is cut off durably. The last record may have been written by a process whose
        fsync failed or never came: it can be in the cache and not on the disk, where a further
        fsync would report success without writing. It is written again, then synced.

        Raises:
            Corruption, FormatUnsupported: as read.
            StorageFull, StorageFailed: the end could not be put in order.
        """
        held: tuple[Operation, Position] | None = None
        held_payload = b""
        torn_at: int | None = None
        try:
            for operation, position, payload in self._records(after):
                if held is not None:
                    yield held
                held, held_payload = (operation, position), payload
        except _TornTail as torn:
            torn_at = torn.offset
        if held is None and torn_at is None:
            return
        self._put_end_in_order(held[1] if held else None, held_payload, torn_at)
        if held is not None:
            yield held

    def _put_end_in_order(self, last: Position | None, payload: bytes, torn_at: int | None) -> None:
        newest = self.segments()[-1]
        if torn_at is not None:
            with closing(self._writable(newest)) as file:
                file.truncate(torn_at)
                file.sync()
        if last is not None:
            header = b"".join(
                (
                    len(payload).to_bytes(_LENGTH_BYTES, "big"),
                    _length_check(last.segment, last.record_offset, len(payload)),
                    last.chain_hash,
                )
            )
            with closing(self._writable(last.segment)) as file:
                file.write(header + payload, last.record_offset)
                file.sync()

    def note_lost_end(self, what: str) -> None:
        """Keep one line for fsck: the log had acknowledged more than it has. Durable on return.

        Raises:
            StorageFull, StorageFailed
        """
        told = self.lost_end()
        if what not in told:
            path = os.path.join(self._directory, _LOST_END_FILE)
            write_file_atomic(path, "".join(f"{line}\n" for line in [*told, what]).encode())

    def forget_lost_end(self) -> None:
        """Somebody has been told. Raises StorageFailed."""
        path = os.path.join(self._directory, _LOST_END_FILE)
        with storage_errors(f"removing {path}"):
            remove_if_there(path)

    def append(self, operation: Operation, at: Position) -> Position:
        """Write `operation` behind `at`, the end of the log; durable on return.

        Raises:
            BadObject: an event that a reader would refuse; nothing was written.
            StorageFull, StorageFailed: whether the record is in the log is for the next `recover`
                to find out (it is when every byte was written); this object appends no more.
        """
        if self._is_dead:
            raise StorageFailed(
                "an earlier write of the event log failed",
                hint="start dm again after checking disk",
            )
        segment, offset = at.segment, max(at.end_offset, SEGMENT_HEADER_BYTES)
        if at.end_offset >= SEGMENT_BYTES_MAX:
            segment, offset = at.segment + 1, SEGMENT_HEADER_BYTES
        record = encode_log_record(operation, at, segment, offset)
        assert operation.first_seq == at.last_seq + 1
        if offset == SEGMENT_HEADER_BYTES and not os.path.exists(self._path(segment)):
            # Atomic and with its directory synced: a segment always has a whole header.
            write_file_atomic(self._path(segment), encode_segment_header(segment, at))
        with closing(self._writable(segment)) as file:
            assert file.size() == offset, "append needs the end of a recovered log"
            try:
                file.write(record, offset)
            except BaseException:
                file.try_truncate(offset)
                raise
            try:
                file.sync()
            except BaseException:
                # The kernel may have dropped the bytes and called them clean: a second fsync
                # would succeed without having written anything.
                self._is_dead = True
                raise
        end = offset + len(record)
        return Position(
            segment,
            offset,
            end,
            operation.last_seq,
            record[_PREFIX_BYTES:_RECORD_HEADER_BYTES],
        )

    def _writable(self, segment: int) -> "_WritableSegment":
        return _WritableSegment(self._path(segment))


class _Segment:
    """One segment file open for reading, with a checked header."""

    def __init__(self, path: str, number: int) -> None:
        self._path = path
        self._number = number
        with storage_errors(f"opening {path}"):
            self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            self.size = os.fstat(self._file).st_size
        try:
            self._check_header()
        except BaseException:
            os.close(self._file)
            raise

    def close(self) -> None:
        os.close(self._file)

    def _check_header(self) -> None:
        header = self.bytes_at(0, SEGMENT_HEADER_BYTES)
        check_at = SEGMENT_HEADER_BYTES - _SEGMENT_CHECK_BYTES
        body, check = header[:check_at], header[check_at:]
        good = blake3(body, derive_key_context=_SEGMENT_CONTEXT).digest(_SEGMENT_CHECK_BYTES)
        if len(header) < SEGMENT_HEADER_BYTES or not body.startswith(_MAGIC) or check != good:
            raise self.corruption(0, "bad segment header")
        version = int.from_bytes(body[8:12], "big")
        if version != _VERSION:
            raise FormatUnsupported(f"event log version {version} is of a newer dmsync")
        if int.from_bytes(body[12:16], "big") != self._number:
            raise self.corruption(0, "the segment bears another number")
        self.first_seq = int.from_bytes(body[16:24], "big")
        self.before_hash = body[24:]

    def check_follows(self, position: Position) -> None:
        if self.before_hash != position.chain_hash or self.first_seq != position.last_seq + 1:
            raise self.corruption(0, "the segment does not follow the one before")

    def bytes_at(self, offset: int, length: int) -> bytes:
        """Up to `length` bytes; fewer only at the end of the file."""
        parts = []
        with storage_errors(f"reading {self._path}"):
            while length > 0:
                part = os.pread(self._file, min(length, 1 << 30), offset)
                if not part:
                    break
                parts.append(part)
                offset += len(part)
                length -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def corruption(self, offset: int, what: str) -> Corruption:
        name = segment_name(self._number)
        return Corruption(
            f"event log {name} is damaged at offset {offset}: {what}",
            hint="restore the events directory from a backup, or run: dm fsck",
            segment=name,
            offset=offset,
        )

    def record(self, offset: int, *, is_last: bool) -> tuple[bytes, bytes]:
        """(chain hash, payload) of the record at `offset`; the hash is not yet checked.

        Raises:
            _TornTail: what is there can only be an append that was cut (last segment only).
            Corruption: anything else that is no record.
        """
        header = self.bytes_at(offset, min(_RECORD_HEADER_BYTES, max(0, self.size - offset)))
        length = self._length(header, offset)
        if length is None:
            self._refuse_header(header, offset, is_last=is_last)
        assert length is not None
        end = offset + _RECORD_HEADER_BYTES + length
        if length == 0 or length > RECORD_BYTES_MAX:
            raise self.corruption(offset, "impossible length")
        if end > self.size:
            if is_last:
                raise _TornTail(offset)
            raise self.corruption(offset, "the record is cut short")
        payload = self.bytes_at(offset + _RECORD_HEADER_BYTES, length)
        if len(payload) != length:
            raise self.corruption(offset, "the file shrank while it was read")
        return header[_PREFIX_BYTES:], payload

    def operation(self, offset: int, payload: bytes) -> Operation:
        try:
            return operation_from_value(decode(payload))
        except BadObject as exc:
            raise self.corruption(offset, exc.message) from exc

    def _length(self, header: bytes, offset: int) -> int | None:
        """The record's length, or None when its check fails or it is not all there."""
        if len(header) < _PREFIX_BYTES:
            return None
        length = int.from_bytes(header[:_LENGTH_BYTES], "big")
        if header[_LENGTH_BYTES:_PREFIX_BYTES] != _length_check(self._number, offset, length):
            return None
        return length

    def _refuse_header(self, header: bytes, offset: int, *, is_last: bool) -> None:
        """A torn append leaves a prefix, or whole sectors as zeros; all else is damage."""
        in_first_sector = _SECTOR_BYTES - offset % _SECTOR_BYTES
        prefix = header[:_PREFIX_BYTES]
        first, second = prefix[:in_first_sector], prefix[in_first_sector:]
        unwritten = not any(first) or (second and not any(second))
        cut_short = len(prefix) < _PREFIX_BYTES
        if is_last and (unwritten or cut_short) and not self._record_begins_after(offset):
            raise _TornTail(offset)
        raise self.corruption(offset, "bad record header")

    def refuse_payload(self, offset: int, length: int, *, is_last: bool) -> None:
        """The chain hash of a record whose bytes are all there does not match."""
        end = offset + _RECORD_HEADER_BYTES + length
        if is_last and end == self.size and self._has_unwritten_sector(offset, end):
            raise _TornTail(offset)
        raise self.corruption(offset, "chain hash does not match")

    def _has_unwritten_sector(self, start: int, end: int) -> bool:
        """Whether the part of some sector that lies in the range is all zeros."""
        content = self.bytes_at(start, end - start)
        first_end = _SECTOR_BYTES - start % _SECTOR_BYTES
        bounds = [0, *range(first_end, len(content), _SECTOR_BYTES), len(content)]
        return any(not any(content[low:high]) for low, high in pairwise(bounds))

    def _record_begins_after(self, offset: int) -> bool:
        """Whether a good record header lies behind `offset`: then this was no torn append."""
        rest = self.bytes_at(offset, self.size - offset)
        for index in range(1, len(rest) - _RECORD_HEADER_BYTES):
            length = int.from_bytes(rest[index : index + _LENGTH_BYTES], "big")
            if not 0 < length <= len(rest) - index - _RECORD_HEADER_BYTES:
                continue  # cheap: rules out nearly every place before a hash is computed
            if self._length(rest[index : index + _PREFIX_BYTES], offset + index) is not None:
                return True
        return False


class _WritableSegment:
    """One segment file open for writing; for the holder of the log lock."""

    def __init__(self, path: str) -> None:
        self._path = path
        with storage_errors(f"opening {path}"):
            self._file = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)

    def close(self) -> None:
        os.close(self._file)

    def size(self) -> int:
        return os.fstat(self._file).st_size

    def write(self, content: bytes, offset: int) -> None:
        view = memoryview(content)
        with storage_errors(f"writing {self._path}"):
            while view:
                written = os.pwrite(self._file, view, offset)
                view = view[written:]
                offset += written

    def truncate(self, size: int) -> None:
        with storage_errors(f"truncating {self._path}"):
            os.ftruncate(self._file, size)

    def try_truncate(self, size: int) -> None:
        """Take back a write that failed; if that fails too, the next recover does it."""
        try:
            os.ftruncate(self._file, size)
        except OSError:
            pass

    def sync(self) -> None:
        with storage_errors(f"syncing {self._path}"), stage("sync"):
            os.fsync(self._file)
