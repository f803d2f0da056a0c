"""Pack files: sealed, immutable runs of records with a table at the end (protocol/PACKS.md 4).

One class appends to a pack under construction (a writer's temporary file or a quarantine part);
functions read sealed ones. A pack under construction has a name that no reader looks at.
"""

import os
import struct
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate
from typing import Final, NamedTuple

from blake3 import blake3

from dmsync.core.delta import compress, decompress
from dmsync.core.ids import DOT_ID_BYTES, KEY_BYTES
from dmsync.core.records import (
    HEADER_BYTES_MAX,
    Record,
    encode_varint,
    parse_header,
    parse_record,
    parse_varint,
)
from dmsync.core.values import plain_value_type
from dmsync.errors import BadObject, Corruption, FormatUnsupported
from dmsync.storage.direct_files import Appender, InOrder
from dmsync.storage.durable import lock_exclusively, remove_if_there, storage_errors
from dmsync.storage.stages import stage

PACK_SUFFIX: Final = ".pack"
VERSION: Final = 1
PACK_BYTES_MAX: Final = 2 * 1024 * 1024 * 1024
"""A writer starts another pack from here: what a copy or a repair has to handle at once."""

_MAGIC: Final = b"DMPACK\r\n"
_END_MAGIC: Final = b"DMPEND\r\n"
_HEADER: Final = struct.Struct("<8sIII16s16s4x")
"""magic, version, compatible features, incompatible features, dot id, key id (reserved)."""
_TRAILER: Final = struct.Struct("<QQIII4s32s8s")
"""footer offset, footer bytes, table bytes, table raw bytes, records, start of the footer's BLAKE3,
BLAKE3 of everything before, end magic."""
_KEY: Final = struct.Struct(f"{KEY_BYTES}s")
HEADER_BYTES: Final = _HEADER.size
ENVELOPE_BYTES: Final = _HEADER.size + _TRAILER.size
"""What a sealed pack has besides records and their table."""
_HASHED_TRAILER_BYTES: Final = _TRAILER.size - 40
_BUFFER_BYTES: Final = 1024 * 1024
_UNBUFFERED_BYTES_MIN: Final = 128 * 1024
"""Joined records of this size are written as they are."""
_READ_BYTES: Final = 4096
_BLOCK_BYTES: Final = 16 * 1024
_BLOCKS_MAX: Final = 48
"""Of each open pack: a joined one holds what 16 commits wrote."""
_LENGTH_BITS: Final = 32
_HELD_BYTES_MAX: Final = 16 * 1024 * 1024
"""A record that begins so far before a growing pack's end is in the file: what is buffered and the
largest record come to less."""
_LARGE_RECORD_BYTES: Final = 32 * 1024
"""Joined records of this size on average hardly compress: they are no bases of later deltas, so
that the page cache does not need them."""
_RUN_BYTES_MIN: Final = 256 * 1024
"""So much in records read one behind the other is a run, which goes on likely."""


class Place(NamedTuple):
    """Where a record is: the pack's file name and the record's offset in bytes."""

    pack: str
    offset: int


@plain_value_type
class PackInfo:
    """A sealed pack. `name` is its file name; `bytes` the whole file."""

    name: str
    bytes: int
    records: int


@plain_value_type
class Footer:
    """What a pack holds: each record's short key (joined: there may be millions) and offset, in
    file order."""

    joined_keys: bytes
    offsets: "array[int]"
    records_end: int

    @property
    def keys(self) -> Iterator[bytes]:
        """The keys one by one."""
        return (key for (key,) in _KEY.iter_unpack(self.joined_keys))


def encode_header(dot_id: bytes) -> bytes:
    return _HEADER.pack(_MAGIC, VERSION, 0, 0, dot_id, bytes(16))


def check_header(header: bytes, pack: str) -> bytes:
    """The dot id in a pack's header.

    Raises:
        Corruption: not a pack.
        FormatUnsupported: written by a newer dmsync, or encrypted.
    """
    if len(header) < HEADER_BYTES or not header.startswith(_MAGIC):
        raise Corruption(f"pack {pack} does not begin like a pack", pack=pack)
    _, version, _, incompatible, dot_id, key_id = _HEADER.unpack_from(header)
    if version != VERSION or incompatible or key_id != bytes(16):
        raise FormatUnsupported(f"pack {pack} needs a newer dmsync", pack=pack, version=version)
    assert isinstance(dot_id, bytes)
    return dot_id


# --- reading --------------------------------------------------------------------------------


def read_footer(fd: int, pack: str) -> tuple[Footer, PackInfo]:
    """The table of a sealed pack, from its end; reads no record.

    Raises:
        Corruption: cut short or not consistent. FormatUnsupported: newer.
    """
    check_header(os.pread(fd, HEADER_BYTES, 0), pack)
    footer = read_table(fd, pack)
    return footer, PackInfo(pack, os.fstat(fd).st_size, len(footer.offsets))


def read_table(fd: int, pack: str) -> Footer:
    """As read_footer, whatever the header says: what a rescue asks for. Raises Corruption."""
    size = os.fstat(fd).st_size
    trailer = os.pread(fd, _TRAILER.size, max(0, size - _TRAILER.size))
    if size < HEADER_BYTES + _TRAILER.size or not trailer.endswith(_END_MAGIC):
        raise Corruption(f"pack {pack} is cut short", pack=pack)
    at, footer_bytes, table_bytes, raw_bytes, count, footer_hash, _, _ = _TRAILER.unpack(trailer)
    if (
        at + footer_bytes + _TRAILER.size != size
        or at < HEADER_BYTES
        or table_bytes + count * KEY_BYTES != footer_bytes
        or raw_bytes > count * 5
    ):
        raise Corruption(f"pack {pack}: its trailer does not fit its size", pack=pack)
    footer = os.pread(fd, footer_bytes, at)
    if blake3(footer).digest()[:4] != footer_hash:
        raise Corruption(f"pack {pack}: its table is damaged", pack=pack)
    try:
        lengths = _parse_lengths(decompress(footer[:table_bytes], raw_bytes), count)
    except BadObject as exc:
        raise Corruption(f"pack {pack}: its table is not readable", pack=pack) from exc
    ends = array("Q", accumulate(lengths, initial=HEADER_BYTES))
    if ends.pop() != at:
        raise Corruption(f"pack {pack}: its table does not fit its records", pack=pack)
    return Footer(footer[table_bytes:], ends, at)


def _parse_lengths(table: bytes, count: int) -> "array[int]":
    lengths = array("I")
    offset = 0
    for _ in range(count):
        length, offset = parse_varint(table, offset, _LENGTH_BITS)
        lengths.append(length)
    if offset != len(table):
        raise BadObject("table has bytes left over")
    return lengths


def _encode_lengths(lengths: "array[int]") -> bytes:
    table = bytearray()
    for length in lengths:
        table += encode_varint(length)
    return bytes(table)


def read_record(fd: int, place: Place) -> Record:
    """One record. Raises Corruption naming the pack, also where the disk cannot read it."""
    try:
        return _record_and_length(fd, place)[0]
    except OSError as exc:
        raise Corruption(
            f"pack {place.pack}: cannot be read at {place.offset}: {exc.strerror or exc}",
            pack=place.pack,
            offset=place.offset,
        ) from exc


def _record_and_length(fd: int, place: Place) -> tuple[Record, int]:
    buffer = os.pread(fd, _READ_BYTES, place.offset)
    try:
        _, start, payload_bytes = parse_header(buffer)
        end = start + payload_bytes
        if end > len(buffer):
            buffer += os.pread(fd, end - len(buffer), place.offset + len(buffer))
            if end > len(buffer):
                raise BadObject("record is cut short")
        return parse_record(buffer)
    except BadObject as exc:
        raise Corruption(
            f"pack {place.pack}: no record at {place.offset}: {exc.message}",
            pack=place.pack,
            offset=place.offset,
        ) from exc


class RecordRun:
    """Large records of one file: read ahead while they are asked for one behind the other."""

    def __init__(self, fd: int, pack: str) -> None:
        self._fd = fd
        self._pack = pack
        self._ahead = InOrder(fd)
        self._next = -1
        self._passed_bytes = 0

    def ahead(self, offset: int) -> Record | None:
        """The record at `offset` if it is the next of a run; None also where it cannot be read.
        Raises OSError."""
        if offset != self._next or self._passed_bytes < _RUN_BYTES_MIN:
            return None
        try:
            record, length = parse_record(self._ahead.held(offset))
        except BadObject:  # most likely cut short
            try:
                record, length = parse_record(self._ahead.load(offset))
            except BadObject:
                return None
        self._next += length
        return record

    def read(self, offset: int) -> Record:
        """The record at `offset`, which a run may begin with. Raises Corruption, OSError."""
        record, length = _record_and_length(self._fd, Place(self._pack, offset))
        if offset != self._next:
            self._passed_bytes = 0
            self._ahead.close()
        self._passed_bytes += length
        self._next = offset + length
        return record

    def close(self) -> None:
        """Let go of what was read ahead."""
        self._ahead.close()


class RecordFile:
    """A sealed pack open for reading; keeps a few blocks of it.

    Chunks of one file lie in order in what each commit wrote, so that the chains of neighbouring
    chunks go through the same few KiB of every commit, several of which may share a pack.
    """

    def __init__(self, fd: int, pack: str) -> None:
        self.fd = fd
        self._pack = pack
        self._blocks: dict[int, bytes] = {}
        self._run = RecordRun(fd, pack)

    def records_nearby(self, offsets: Iterable[int]) -> Iterator[Record | None]:
        """The record at each offset; None where none can be read."""
        for offset in offsets:
            try:
                yield self._run.ahead(offset) or self._record(offset)
            except (Corruption, OSError):
                yield None

    def _record(self, offset: int) -> Record:
        block = self._block(offset // _BLOCK_BYTES)
        try:
            return parse_record(block, offset % _BLOCK_BYTES)[0]
        except BadObject:  # most likely cut short by the block's end
            return self._run.read(offset)

    def _block(self, number: int) -> bytes:
        block = self._blocks.get(number)
        if block is None:
            if len(self._blocks) >= _BLOCKS_MAX:
                del self._blocks[next(iter(self._blocks))]
            try:
                block = os.pread(self.fd, _BLOCK_BYTES, number * _BLOCK_BYTES)
            except OSError:
                return b""
            self._blocks[number] = block
        return block

    def rest(self) -> None:
        """Let go of what was read ahead: another pack is read now."""
        self._run.close()

    def close(self) -> None:
        self._run.close()
        os.close(self.fd)


def iterate_file_records(fd: int, start: int, end: int) -> Iterator[tuple[Record, int, int]]:
    """Records between two offsets with where each starts and ends. Raises BadObject."""
    buffer, buffer_at = b"", start
    while start < end:
        inside = start - buffer_at
        if len(buffer) - inside < HEADER_BYTES_MAX:
            buffer, buffer_at, inside = os.pread(fd, _span(end - start), start), start, 0
        _, payload_at, payload_bytes = parse_header(buffer, inside)
        if payload_at + payload_bytes > len(buffer):
            span = _span(end - start, payload_at - inside + payload_bytes)
            buffer, buffer_at, inside = os.pread(fd, span, start), start, 0
        record, record_end = parse_record(buffer, inside)
        yield record, start, buffer_at + record_end
        start = buffer_at + record_end


def _span(remaining: int, at_least: int = 0) -> int:
    return min(remaining, max(at_least, _BUFFER_BYTES))


def pack_hash_matches(fd: int, pack: str) -> bool:
    """True when the whole file has the hash in its trailer and the name that follows from it."""
    size = os.fstat(fd).st_size
    hasher = blake3()
    offset, hashed = 0, size - 40
    while offset < hashed:
        part = os.pread(fd, min(4 * _BUFFER_BYTES, hashed - offset), offset)
        hasher.update(part)
        offset += len(part)
    digest = hasher.digest()
    return os.pread(fd, 32, hashed) == digest and pack == _pack_name(digest)


def _pack_name(digest: bytes) -> str:
    return digest[:16].hex() + PACK_SUFFIX


# --- writing --------------------------------------------------------------------------------


class PackBuilder:
    """A pack under construction in a locked temporary file.

    The lock goes when the process does: an unlocked temporary file is nobody's. Appended bytes
    are hashed as they are, so that sealing reads nothing again.
    """

    def __init__(self, path: str, fd: int) -> None:
        self.path = path
        self.name = os.path.basename(path)
        self._fd = fd
        self._appender = Appender(fd)
        self._run = RecordRun(fd, self.name)
        self._hasher = blake3()
        self._buffer = bytearray()
        self._flushed_bytes = 0
        self._keys = bytearray()
        self._lengths = array("I")

    @classmethod
    def create(cls, directory: str, prefix: str, suffix: str, dot_id: bytes) -> "PackBuilder":
        """A new locked file in `directory`. Raises StorageFull, StorageFailed."""
        assert len(dot_id) == DOT_ID_BYTES
        with storage_errors(f"starting a pack in {directory}"):
            while True:
                path = os.path.join(directory, f"{prefix}{os.urandom(8).hex()}{suffix}")
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                fd = os.open(path, flags, 0o600)
                # Between open and lock a sweeper may have taken it for a dead one.
                if lock_exclusively(fd, wait=False) and os.fstat(fd).st_nlink:
                    break
                os.close(fd)
        builder = cls(path, fd)
        builder._write(encode_header(dot_id))
        return builder

    @classmethod
    def adopt(cls, path: str, fd: int) -> "PackBuilder":
        """Continue a locked file behind its header; `restore` its records before appending."""
        builder = cls(path, fd)
        header = os.pread(fd, HEADER_BYTES, 0)
        builder._hasher.update(header)
        builder._flushed_bytes = len(header)
        return builder

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self._flushed_bytes + len(self._buffer)

    @property
    def records(self) -> int:
        return len(self._lengths)

    def append(self, record: bytes, key: bytes) -> int:
        """Add an encoded record; returns its offset. Buffered. Raises StorageFull and such."""
        offset = self.size
        self._note(record, key)
        self._buffer += record
        if len(self._buffer) >= _BUFFER_BYTES:
            self._write_buffer()
        return offset

    def append_joined(
        self, records: bytes | memoryview, lengths: Sequence[int], keys: Sequence[bytes]
    ) -> int:
        """Add encoded records that lie one behind the other; returns the first one's offset. As
        `append`, but large ones are not copied."""
        offset = self.size
        self._keys += b"".join(keys)
        self._lengths.extend(lengths)
        if len(records) >= _UNBUFFERED_BYTES_MIN:
            self._write_buffer()
            self._write(records, past_cache=len(records) >= _LARGE_RECORD_BYTES * len(lengths))
            return offset
        self._buffer += records
        if len(self._buffer) >= _BUFFER_BYTES:
            self._write_buffer()
        return offset

    def restore(self, record: bytes, key: bytes) -> None:
        """Take over a record that an earlier process wrote at this place."""
        self._note(record, key)
        self._hasher.update(record)
        self._flushed_bytes += len(record)

    def truncate_to_restored(self) -> None:
        """Drop what follows the restored records. Raises StorageFailed."""
        with storage_errors(f"truncating {self.path}"):
            os.ftruncate(self._fd, self._flushed_bytes)
            self._fsync()

    def _note(self, record: bytes, key: bytes) -> None:
        self._keys += key
        self._lengths.append(len(record))

    def read(self, offset: int) -> Record:
        """A record appended before. Raises Corruption, StorageFull, StorageFailed."""
        if self.size - offset <= _HELD_BYTES_MAX:
            self.flush()
        with storage_errors(f"reading pack {self.path}"):
            return self._run.ahead(offset) or self._run.read(offset)

    def flush(self) -> None:
        """Have everything in the file. Raises StorageFull, StorageFailed."""
        self._write_buffer()
        with storage_errors(f"writing pack {self.path}"):
            self._appender.flush()

    def _write_buffer(self) -> None:
        if self._buffer:
            self._write(memoryview(self._buffer))
            self._buffer = bytearray()  # not cleared: a failure may still hold a view of it

    def _write(self, data: bytes | memoryview, *, past_cache: bool = False) -> None:
        with storage_errors(f"writing pack {self.path}"):
            self._appender.append(data, self._flushed_bytes, past_cache=past_cache)
        self._hasher.update(data)
        self._flushed_bytes += len(data)

    def sync(self) -> None:
        """Everything appended is durable on return (the name too once its directory is)."""
        self.flush()
        self.sync_flushed()

    def sync_flushed(self) -> None:
        """As `sync` for what was flushed; may run while another thread appends."""
        with storage_errors(f"syncing pack {self.path}"), stage("sync"):
            self._fsync()

    def _fsync(self) -> None:
        """Raises OSError; the file is gone then. The kernel takes pages that it could not write for
        clean: reading them back would be sound, and a further fsync would succeed without having
        written anything, so nobody may go on with this file."""
        try:
            os.fsync(self._fd)
        except OSError:
            with suppress(OSError):
                remove_if_there(self.path)
            raise

    def finish(self) -> PackInfo:
        """Write footer and trailer, durably. The file keeps its temporary name and its lock."""
        footer_at = self.size
        table = _encode_lengths(self._lengths)
        frame = compress(table)
        footer_hash = blake3(frame).update(self._keys).digest()
        self._buffer += frame
        self._buffer += self._keys
        start = _TRAILER.pack(
            footer_at,
            len(frame) + len(self._keys),
            len(frame),
            len(table),
            self.records,
            footer_hash[:4],
            bytes(32),
            _END_MAGIC,
        )[:_HASHED_TRAILER_BYTES]
        self._buffer += start
        self._write_buffer()
        digest = self._hasher.digest()
        self._write(digest + _END_MAGIC)
        self.sync()
        return PackInfo(_pack_name(digest), self._flushed_bytes, self.records)

    def footer(self) -> Footer:
        """Keys and offsets of what was appended."""
        offsets = array("Q", accumulate(self._lengths, initial=HEADER_BYTES))
        end = offsets.pop()
        return Footer(bytes(self._keys), offsets, end)

    def close(self) -> None:
        """Give the file and its lock up; it stays as it is."""
        self._run.close()
        self._appender.close()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def discard(self) -> None:
        """Remove the file."""
        with storage_errors(f"removing {self.path}"):
            remove_if_there(self.path)
        self.close()
