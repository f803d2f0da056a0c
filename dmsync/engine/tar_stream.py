"""A recorded tree as a tar archive (POSIX pax), written front to back in bounded memory.

Names, link targets and attributes are the recorded bytes, as GNU tar writes them; times have all
their digits; attributes are SCHILY.xattr records, ACLs among them (system.posix_acl_*). Files
with holes are in GNU's sparse format 1.0, which other readers of pax understand too.
"""

import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from dmsync.core.ids import Kind
from dmsync.core.objects import Entry, EntryKind
from dmsync.core.pages import ZERO_RUN, Span, file_spans, walk_tree
from dmsync.engine.file_content import ChunkReader
from dmsync.engine.progress import Progress
from dmsync.errors import BadObject

BLOCK_BYTES: Final = tarfile.BLOCKSIZE
_ZEROS: Final = bytes(1024 * 1024)
_NAME_BYTES_MAX: Final = 100
_OWNER_BYTES_MAX: Final = 32
_ID_MAX: Final = 0o7777777
_NUMBER_MAX: Final = 0o77777777777
_TYPES: Final = {
    EntryKind.FILE: tarfile.REGTYPE,
    EntryKind.DIRECTORY: tarfile.DIRTYPE,
    EntryKind.SYMLINK: tarfile.SYMTYPE,
    EntryKind.FIFO: tarfile.FIFOTYPE,
    EntryKind.CHARACTER_DEVICE: tarfile.CHRTYPE,
    EntryKind.BLOCK_DEVICE: tarfile.BLKTYPE,
}

Write = Callable[[bytes], object]


@dataclass(frozen=True, slots=True)
class _Piece:
    """A run of a file's bytes as an archive with holes divides it."""

    span: Span
    is_hole: bool


class TarStream:
    """Writes members to `write`; `finish` ends the archive.

    `users` and `groups` name the numeric owners. Names of one hardlink group become links to the
    first of them written.
    """

    def __init__(
        self,
        reader: ChunkReader,
        write: Write,
        users: Mapping[int, str],
        groups: Mapping[int, str],
        progress: Progress | None = None,
    ) -> None:
        self._reader = reader
        self._output = write
        self._users = users
        self._groups = groups
        self._progress = progress
        self._first_names: dict[bytes, bytes] = {}
        self._bytes_out = 0
        self.files = 0
        """Members that are no directories."""
        self.bytes_written = 0
        """Bytes of file content, holes not counted."""

    def add_tree(self, directory: Entry) -> None:
        """All below a directory, parents first. Raises ObjectMissing, BadObject."""
        for path, entry in walk_tree(self._reader, directory):
            self.add(path, entry)

    def add(self, path: bytes, entry: Entry) -> None:
        """One member. Raises ObjectMissing, BadObject."""
        first = self._first_names.setdefault(entry.hardlink, path) if entry.hardlink else path
        if first != path:
            self._add_header(path, entry, tarfile.LNKTYPE, link=first, size=0)
        elif entry.kind is EntryKind.FILE:
            self._add_file(path, entry)
        else:
            self._add_header(path, entry, _TYPES[entry.kind], link=entry.link_target, size=0)
        self.files += entry.kind is not EntryKind.DIRECTORY
        if self._progress is not None:
            self._progress.reached(self.bytes_written, self.files)

    def finish(self) -> None:
        """The two empty blocks at the end, and what fills the last record."""
        self._write(bytes(2 * BLOCK_BYTES))
        self._write(bytes(-self._bytes_out % tarfile.RECORDSIZE))

    def _write(self, data: bytes) -> None:
        self._bytes_out += len(data)
        self._output(data)

    def _pad(self) -> None:
        self._write(bytes(-self._bytes_out % BLOCK_BYTES))

    # --- headers -----------------------------------------------------------------------------

    def _add_header(
        self,
        path: bytes,
        entry: Entry,
        kind: bytes,
        *,
        link: bytes,
        size: int,
        more: Mapping[bytes, bytes] | None = None,
    ) -> None:
        """The header of one member; `more` are further pax records of it."""
        records = dict(more or {})
        header = tarfile.TarInfo()
        header.type = kind
        name = path + b"/" if entry.kind is EntryKind.DIRECTORY else path
        header.name = _fitting(records, b"path", name, _NAME_BYTES_MAX)
        header.linkname = _fitting(records, b"linkpath", link, _NAME_BYTES_MAX)
        header.mode = entry.mode
        header.size = _number(records, b"size", size, _NUMBER_MAX)
        header.uid = _number(records, b"uid", entry.uid, _ID_MAX)
        header.gid = _number(records, b"gid", entry.gid, _ID_MAX)
        user = self._users.get(entry.uid, "").encode("utf-8", "surrogatepass")
        group = self._groups.get(entry.gid, "").encode("utf-8", "surrogatepass")
        header.uname = _fitting(records, b"uname", user, _OWNER_BYTES_MAX)
        header.gname = _fitting(records, b"gname", group, _OWNER_BYTES_MAX)
        major, minor = entry.device
        header.devmajor = _number(records, b"SCHILY.devmajor", major, _ID_MAX)
        header.devminor = _number(records, b"SCHILY.devminor", minor, _ID_MAX)
        header.mtime = _time(records, entry.mtime_ns)
        if kind != tarfile.LNKTYPE:
            for key, value in entry.xattrs:
                records[b"SCHILY.xattr." + _keyword(key)] = value
        self._write_records(records, path)
        self._write(header.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape"))

    def _write_records(self, records: Mapping[bytes, bytes], path: bytes) -> None:
        if not records:
            return
        body = b"".join(_record(key, value) for key, value in records.items())
        header = tarfile.TarInfo(
            _header_text(b"PaxHeaders/" + path.rpartition(b"/")[2], _NAME_BYTES_MAX)
        )
        header.type = tarfile.XHDTYPE
        header.size = len(body)
        self._write(header.tobuf(tarfile.USTAR_FORMAT, "utf-8", "surrogateescape"))
        self._write(body)
        self._pad()

    # --- files -------------------------------------------------------------------------------

    def _add_file(self, path: bytes, entry: Entry) -> None:
        if entry.sparse and any(piece.is_hole for piece in self._pieces(entry)):
            self._add_sparse_file(path, entry)
            return
        self._add_header(path, entry, tarfile.REGTYPE, link=b"", size=entry.size)
        for span in file_spans(self._reader, entry):
            self._write_span(span)
        self._pad()

    def _write_span(self, span: Span) -> None:
        self.bytes_written += span.length
        if span.chunk == ZERO_RUN:
            for start in range(0, span.length, len(_ZEROS)):
                self._write(_ZEROS[: min(len(_ZEROS), span.length - start)])
            return
        data = self._reader.read(Kind.CHUNK, span.chunk)
        if len(data) != span.length:
            raise BadObject("a chunk is not as long as its span")
        self._write(data)

    def _pieces(self, entry: Entry) -> Iterator[_Piece]:
        """The file from its beginning to its end. Holes are whole blocks of zeros, as readers of
        the format want them; a file may end in one of any length."""
        offset = 0
        for span in file_spans(self._reader, entry):
            end = offset + span.length
            first = last = end
            if span.chunk == ZERO_RUN:
                first = min(offset + -offset % BLOCK_BYTES, end)
                last = end if end == entry.size else max(end - end % BLOCK_BYTES, first)
            if first > offset:
                yield _Piece(Span(first - offset, span.chunk), is_hole=False)
            if last > first:
                yield _Piece(Span(last - first, ZERO_RUN), is_hole=True)
            if end > last:
                yield _Piece(Span(end - last, ZERO_RUN), is_hole=False)
            offset = end

    def _data_runs(self, entry: Entry) -> Iterator[tuple[int, int]]:
        """(offset, length) of what is no hole, in order; an empty run at the end of a file that
        ends in a hole."""
        offset = start = 0
        for piece in self._pieces(entry):
            if piece.is_hole:
                if offset > start:
                    yield start, offset - start
                start = offset + piece.span.length
            offset += piece.span.length
        yield start, offset - start

    def _add_sparse_file(self, path: bytes, entry: Entry) -> None:
        """Reads the manifest once more for each of: how long the map is, the map, the data."""
        runs = data_bytes = map_bytes = 0
        for offset, length in self._data_runs(entry):
            runs += 1
            data_bytes += length
            map_bytes += len(b"%d\n%d\n" % (offset, length))
        map_bytes += len(b"%d\n" % runs)
        map_bytes += -map_bytes % BLOCK_BYTES
        above, slash, name = path.rpartition(b"/")
        more = {
            b"GNU.sparse.major": b"1",
            b"GNU.sparse.minor": b"0",
            b"GNU.sparse.name": path,
            b"GNU.sparse.realsize": b"%d" % entry.size,
        }
        stored = above + slash + b"GNUSparseFile.0/" + name
        size = map_bytes + data_bytes
        self._add_header(stored, entry, tarfile.REGTYPE, link=b"", size=size, more=more)
        self._write(b"%d\n" % runs)
        for offset, length in self._data_runs(entry):
            self._write(b"%d\n%d\n" % (offset, length))
        self._pad()
        for piece in self._pieces(entry):
            if not piece.is_hole:
                self._write_span(piece.span)
        self._pad()


def _header_text(name: bytes, most: int) -> str:
    """As tarfile takes names: the bytes, cut to a header's field, undecodable ones escaped."""
    return name[:most].decode("utf-8", "surrogateescape")


def _fitting(records: dict[bytes, bytes], keyword: bytes, text: bytes, most: int) -> str:
    """What the header's field can hold of `text`; all of it goes into a record when it is more."""
    if len(text) > most:
        records[keyword] = text
    return _header_text(text, most)


def _number(records: dict[bytes, bytes], keyword: bytes, value: int, most: int) -> int:
    if value > most:
        records[keyword] = b"%d" % value
        return 0
    return value


def _time(records: dict[bytes, bytes], time_ns: int) -> int:
    """Whole seconds for the header; the exact time as a record where that is not all."""
    seconds, rest = divmod(abs(time_ns), 10**9)
    if time_ns < 0 or rest or seconds > _NUMBER_MAX:
        sign = b"-" if time_ns < 0 else b""
        records[b"mtime"] = b"%s%d.%09d" % (sign, seconds, rest)
    return seconds if time_ns >= 0 and seconds <= _NUMBER_MAX else 0


def _keyword(name: bytes) -> bytes:
    """An attribute's name as part of a keyword, which cannot hold `=`: escaped as GNU tar does."""
    return name.replace(b"%", b"%25").replace(b"=", b"%3D")


def _record(keyword: bytes, value: bytes) -> bytes:
    """`LENGTH keyword=value\\n`, where LENGTH counts itself."""
    rest = len(keyword) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, keyword, value)
