"""Every decoder that reads bytes of a peer or of a file, and inputs to begin with.

Of each only the project's typed errors may escape, in bounded time and memory.
"""

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

from dmsync.core.delta import compress, compress_with_prefix, decompress
from dmsync.core.durations import parse_duration
from dmsync.core.encoding import decode, encode
from dmsync.core.events import operation_from_value
from dmsync.core.ids import DotId, Kind, ObjectId, object_id, short_key
from dmsync.core.names import parse_dot_name, parse_remote_url
from dmsync.core.objects import (
    ROOT_ENTRY,
    Commit,
    Entry,
    EntryKind,
    Layout,
    Tag,
    commit_from_bytes,
    tag_from_bytes,
)
from dmsync.core.pages import DIRECTORY, MANIFEST, Child, Page, Span, decode_page, encode_page
from dmsync.core.records import (
    BaseSlice,
    Encoding,
    Record,
    decode_record,
    encode_record,
    parse_record,
)
from dmsync.core.revisions import parse_revision_or_range, split_path
from dmsync.core.sshsig import parse_signature
from dmsync.engine.allowed_signers import read_allowed_signers
from dmsync.engine.bundles import open_bundle
from dmsync.errors import DmError
from dmsync.storage.event_log import START, EventLog
from dmsync.storage.layout import Format, parse_format
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.packs import (
    HEADER_BYTES,
    Place,
    encode_header,
    iterate_file_records,
    read_footer,
    read_record,
)
from dmsync.storage.quarantine import PART_SUFFIX, Quarantine
from dmsync.storage.stat_cache import StatCache
from dmsync.surfaces.settings import _parse_config
from dmsync.transports.authorized_keys import BadKeyLine, parse_line
from dmsync.transports.host_keys import look_up_host
from dmsync.transports.remote_command import requested_dot, requested_home
from dmsync.wire import limits
from dmsync.wire.bundle_header import header_from_bytes
from dmsync.wire.connection import Connection, Role
from dmsync.wire.frames import Flag, Frame, FrameType
from dmsync.wire.messages import Hello, frame_from_message, message_from_frame
from tools.fuzzing import mending

DOT: Final = DotId(bytes(16))
_BASE: Final = bytes(range(256)) * 128
_HELLO: Final = Hello(1, 1, (("hash", "blake3-256"),), (), "fuzz", bytes(16), 1, ())


@dataclass(frozen=True)
class Decoder:
    """`mend` corrects checksums and lengths, so that what is behind them is reached."""

    decode: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    mend: Callable[[bytes], bytes] | None = None
    is_value: bool = False
    """The input is a canonical value: it is also changed as one."""
    errors: tuple[type[Exception], ...] = (DmError,)


def fuzz_one(decoder: Decoder, data: bytes) -> None:
    """Give a decoder one input as it is, and one with its checksums mended. Raises what is no typed
    error."""
    inputs = [data]
    if decoder.mend is not None:
        inputs.append(decoder.mend(data))
    for one in inputs:
        with suppress(*decoder.errors):
            decoder.decode(one)


@contextmanager
def _file_of(data: bytes, suffix: str = "") -> Iterator[str]:
    directory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.NamedTemporaryFile(dir=directory, suffix=suffix) as file:
        file.write(data)
        file.flush()
        yield file.name


def _of_file(read: Callable[[str], object]) -> Callable[[bytes], object]:
    def decode_file(data: bytes) -> object:
        with _file_of(data) as path:
            return read(path)

    return decode_file


def _of_text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: parse(data.decode("utf-8", "surrogateescape"))


# --- the wire -----------------------------------------------------------------------------------


def _converse(data: bytes) -> None:
    """Both roles, from the opening and after it, in one piece and in small ones."""
    for role in Role:
        for is_open in (False, True):
            connection = Connection(role)
            connection.send(_HELLO)
            start = limits.MAGIC if role is Role.CLIENT and data[:1] > b"\x10" else b""
            if is_open:
                greeting = Connection(Role.SERVER)
                greeting.send(_HELLO)
                said = greeting.data_to_send()
                connection.receive(said if role is Role.CLIENT else said[len(limits.MAGIC) :])
                start = b""
            with suppress(DmError):
                connection.receive(start + data[: len(data) // 2])
                connection.receive(data[len(data) // 2 :])


def _message(data: bytes) -> None:
    number = data[0] if data else 0
    if number not in set(FrameType):
        return
    flags = Flag(data[1] & 3) if len(data) > 1 else Flag.NONE
    message = message_from_frame(Frame(FrameType(number), flags, data[2:]))
    again = frame_from_message(message)
    assert again.payload == data[2:] or len(again.payload) < len(data), "accepted, not canonical"


def _vectors(kind: str) -> list[bytes]:
    root = os.path.join(os.path.dirname(__file__), "..", "..", "protocol", "vectors", kind)
    found = []
    for entry in sorted(os.scandir(root), key=lambda entry: entry.name):
        if not entry.is_file():
            continue
        with open(entry.path, encoding="utf-8") as file:
            text = file.read().rpartition("bytes:")[2]
        with suppress(ValueError):
            found.append(bytes.fromhex("".join(text.split())))
    return found


def _frames() -> list[bytes]:
    return _vectors("wire")


def _messages() -> list[bytes]:
    return [bytes((frame[4], frame[5])) + frame[6:] for frame in _frames()]


# --- objects ------------------------------------------------------------------------------------

_ID: Final = ObjectId(bytes(range(32)))


def _commits() -> list[bytes]:
    plain = Commit(ROOT_ENTRY, (), "a", "b", 1, 60, "message")
    full = Commit(
        ROOT_ENTRY,
        (_ID, ObjectId(bytes(32))),
        "a",
        "b",
        -1,
        -60,
        "m",
        (("k", "v"), ("l", "")),
        ((0, "root"), (7, "x")),
        ((1, "g"),),
        ((2, b"x"),),
    )
    return [plain.to_bytes(), full.to_bytes()]


def _entries() -> tuple[Entry, ...]:
    xattrs = ((b"user.a", b"1"), (b"user.b", b""))
    return (
        Entry(b"a", EntryKind.FILE, 0o644, 1, 2, 3, 5, bytes(_ID), Layout.SINGLE, xattrs=xattrs),
        Entry(b"b", EntryKind.FILE, 0o4755, size=9, content=_ID, layout=Layout.CDC, tree=_ID),
        Entry(b"c", EntryKind.DIRECTORY, 0o755, tree=_ID),
        Entry(b"d", EntryKind.SYMLINK, 0o777, link_target=b"../x"),
        Entry(b"e", EntryKind.FIFO, 0o600, hardlink=b"a/b"),
        Entry(b"f", EntryKind.BLOCK_DEVICE, 0o600, device=(1, 2)),
        Entry(b"g", EntryKind.FILE, 0, size=10**9, layout=Layout.ZERO, sparse=True),
    )


def _directories() -> list[bytes]:
    inner = Page(DIRECTORY, 2, (Child(b"a", _ID, 7), Child(b"b", _ID, 9)))
    return [encode_page(Page(DIRECTORY, 0, _entries())), encode_page(inner)]


def _manifests() -> list[bytes]:
    leaf = Page(MANIFEST, 0, (Span(5, _ID), Span(1 << 40, ObjectId(bytes(32)))))
    return [encode_page(leaf), encode_page(Page(MANIFEST, 1, (Child(b"", _ID, 5),)))]


def _tags() -> list[bytes]:
    return [Tag(_ID, "v1.0", "me", 5, 0, "first").to_bytes()]


def _record(data: bytes) -> None:
    record, end = parse_record(data)
    assert encode_record(record) == data[:end], "accepted, not canonical"
    if all(True for _ in record.bases):
        decode_record(record, [_BASE for _ in record.bases])


def _record_seeds() -> list[bytes]:
    new = _BASE[:20_000] + b"changed" + _BASE[20_007:]
    key = short_key(object_id(Kind.CHUNK, _BASE))
    pages = compress_with_prefix(new[16_384:20_480], _BASE[16_384:20_480])
    return [
        encode_record(record)
        for record in (
            Record(Kind.CHUNK, Encoding.RAW, 3, b"abc"),
            Record(Kind.COMMIT, Encoding.ZSTD, 3, compress(b"abc")),
            Record(
                Kind.CHUNK,
                Encoding.PREFIX,
                len(new),
                compress_with_prefix(new, _BASE),
                (BaseSlice(key),),
            ),
            Record(Kind.CHUNK, Encoding.PATCH, len(_BASE), pages, (BaseSlice(key),), 0b10000),
            Record(
                Kind.PAGE,
                Encoding.SIMILAR,
                len(new),
                compress_with_prefix(new, _BASE[8192:16384] + _BASE[:8192]),
                (BaseSlice(key, 1), BaseSlice(key, 0)),
            ),
        )
    ]


def _frame(data: bytes) -> None:
    """A size in three bytes, whether there is a prefix, a zstd frame."""
    raw_bytes = int.from_bytes(data[:3], "big")
    found = decompress(data[4:], raw_bytes, _BASE if data[3:4] > b"\x7f" else None)
    assert len(found) == raw_bytes


def _frame_seeds() -> list[bytes]:
    size = len(_BASE).to_bytes(3, "big")
    return [
        size + b"\0" + compress(_BASE),
        size + b"\xff" + compress_with_prefix(_BASE[::-1], _BASE),
        (0).to_bytes(3, "big") + b"\0" + compress(b""),
    ]


# --- files of a store ---------------------------------------------------------------------------


def _pack(path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        footer, _ = read_footer(fd, "x.pack")
        for offset in footer.offsets[:50]:
            with suppress(DmError):
                read_record(fd, Place("x.pack", offset))
        for _found in iterate_file_records(fd, HEADER_BYTES, footer.records_end):
            pass
    finally:
        os.close(fd)


class _Scratch:
    """A store's directory for decoders that need one; made once."""

    def __init__(self) -> None:
        base = "/dev/shm" if os.path.isdir("/dev/shm") else None
        self.directory = tempfile.mkdtemp(prefix="dm-fuzz-", dir=base)
        self._made_by = os.getpid()
        atexit.register(self._remove)
        self.objects: ObjectStore | None = None

    def _remove(self) -> None:
        if os.getpid() == self._made_by:
            shutil.rmtree(self.directory, ignore_errors=True)

    def path(self, *parts: str) -> str:
        """A path inside, with its directory made."""
        path = os.path.join(self.directory, *parts)
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return path


_scratch: list[_Scratch] = []


def _place() -> _Scratch:
    if not _scratch:
        _scratch.append(_Scratch())
    return _scratch[0]


def _log(data: bytes) -> None:
    directory = os.path.dirname(_place().path("events", "x"))
    for name in os.listdir(directory):
        os.unlink(os.path.join(directory, name))
    with open(os.path.join(directory, "00000001.log"), "wb") as file:
        file.write(data)
    log = EventLog(directory)
    for read in (log.read, log.recover):
        with suppress(DmError):
            for _found in read(START):
                pass


def _log_seeds() -> list[bytes]:
    from dmsync.core.events import DotCreated, Operation, StoreCreated

    directory = os.path.dirname(_place().path("made-events", "x"))
    log = EventLog(directory)
    position = START
    for first, events in (
        (1, (StoreCreated(bytes(16), 1),)),
        (2, (DotCreated(DOT, "", "a", "me"),)),
    ):
        operation = Operation(first, first, bytes(15) + bytes((first,)), "init", "me", events)
        position = log.append(operation, position)
    with open(os.path.join(directory, sorted(os.listdir(directory))[0]), "rb") as file:
        return [file.read()]


def _operation(data: bytes) -> None:
    operation_from_value(decode(data))


def _operation_seeds() -> list[bytes]:
    found = []
    for event in _vectors("events"):
        with suppress(DmError):
            found.append(encode((1, 1, bytes(16), "init", "me", (decode(event),))))
    return [*found, encode((1, 1, bytes(16), "init", "me", ()))]


def _made_objects() -> ObjectStore:
    place = _place()
    if place.objects is None:
        place.objects = ObjectStore(os.path.dirname(place.path("dot", "x")))
    return place.objects


def _part(data: bytes) -> None:
    objects = _made_objects()
    path = _place().path("dot", "quarantine", f"{'0' * 32}{PART_SUFFIX}")
    with open(path, "wb") as file:
        file.write(data)
    quarantine = Quarantine(objects)
    quarantine.discard()
    quarantine.close()
    with suppress(FileNotFoundError):
        os.unlink(path)


def _part_seeds() -> list[bytes]:
    objects = _made_objects()
    return [encode_header(objects.dot_id) + b"".join(_record_seeds()[:2])]


def _pack_seeds() -> list[bytes]:
    directory = os.path.dirname(_place().path("made-dot", "x"))
    objects = ObjectStore(directory)
    with objects.writer() as writer:
        writer.put(Kind.CHUNK, b"one chunk")
        writer.put(Kind.PAGE, _directories()[0])
        writer.seal()
    objects.close()
    packs = os.path.join(directory, "packs")
    found = []
    for name in os.listdir(packs):
        with open(os.path.join(packs, name), "rb") as file:
            found.append(file.read())
    return found


def _stat_cache(path: str) -> None:
    cache = StatCache.load(path)
    if cache is not None:
        try:
            list(cache.blocks())
            cache.find(b"a/b")
        except (ValueError, TypeError):
            pass  # written by this user, under a checksum: taken for what it is


def _cache_seeds() -> list[bytes]:
    from dmsync.storage.stat_cache import Spool

    with _file_of(b"") as path:
        StatCache(ROOT_ENTRY, Spool([]), 5).save(path + ".made")
        with open(path + ".made", "rb") as file:
            found = file.read()
        os.unlink(path + ".made")
    return [found]


def _bundle(path: str) -> None:
    with open_bundle(path) as bundle:
        for _found in bundle.messages():
            pass


def _bundle_seeds() -> list[bytes]:
    return [mending.bundle(_header_seeds()[0])]


def _header_seeds() -> list[bytes]:
    refs = (("branch/master", bytes(_ID), None), ("tag/v1", bytes(_ID), None, bytes(_ID)))
    fields = (bytes(16), 1, 2, bytes(DOT), "", "apples", "master", refs, (bytes(_ID),), 1, 0, 1)
    return [encode((1, (), *fields))]


# --- text ---------------------------------------------------------------------------------------

_KEY_LINE: Final = (
    b"ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIMBR5FHQn5ebS616WJcbkV5kegpdrvanWp9pztje84Gp"
)

_SIGNATURE: Final = (
    b"-----BEGIN SSH SIGNATURE-----\n"
    b"U1NIU0lHAAAAAQAAADMAAAALc3NoLWVkMjU1MTkAAAAgwFHkUdCfl5tLrXpYlxuRXmR6Cl\n"
    b"2u9qdan2nO2N7zgakAAAAGZG1zeW5jAAAAAAAAAAZzaGE1MTIAAABTAAAAC3NzaC1lZDI1\n"
    b"NTE5AAAAQBfLnB0J3SjTXSnE5xJWUQQEHLuHi5qNxEI0C0dzMSUTo0pGvp9vJ+4LhGFt0Y\n"
    b"+Ts/FqqL1y3dcul1+kRguRdQ0=\n"
    b"-----END SSH SIGNATURE-----\n"
)


def _config(data: bytes) -> None:
    config: Any = _parse_config("config.toml", data)
    for word in ("user", "remotes", "hooks", "merge_units", "gc_grace"):
        if hasattr(config, word):
            getattr(config, word)() if callable(getattr(config, word)) else None


def _config_seeds() -> list[bytes]:
    return [
        b'[user]\nname = "a"\nemail = "b@c"\n',
        b'[remotes.origin]\nurl = "ssh://a@b/c"\ndm-command = "/usr/bin/dm"\n',
        b'[hooks.apples]\nbefore = "true"\n[gc]\ngrace = "14d"\n',
        b'[merge.x]\npatterns = ["*.db"]\ncommand = "true"\n',
    ]


def _revision(text: str) -> None:
    for parse in (parse_revision_or_range, split_path):
        with suppress(DmError):
            parse(text)


def _url(text: str) -> None:
    for parse in (parse_remote_url, parse_dot_name, parse_duration):
        with suppress(DmError):
            parse(text)


def _asked(text: str) -> None:
    for parse in (requested_home, requested_dot):
        with suppress(DmError, ValueError):  # both are caught where they are called
            parse(text)


def _texts(*texts: bytes) -> Callable[[], list[bytes]]:
    return lambda: list(texts)


DECODERS: Final[dict[str, Decoder]] = {
    "conversation": Decoder(_converse, _frames, mending.frame_lengths),
    "message": Decoder(_message, _messages, mending.message_value),
    "commit": Decoder(commit_from_bytes, _commits, is_value=True),
    "tag": Decoder(tag_from_bytes, _tags, is_value=True),
    "directory-page": Decoder(lambda d: decode_page(d, DIRECTORY), _directories, is_value=True),
    "manifest-page": Decoder(lambda d: decode_page(d, MANIFEST), _manifests, is_value=True),
    "record": Decoder(_record, _record_seeds),
    "zstd-frame": Decoder(_frame, _frame_seeds, mending.frame_size),
    "pack": Decoder(_of_file(_pack), _pack_seeds, mending.pack),
    "quarantine-part": Decoder(_part, _part_seeds),
    "event-segment": Decoder(_log, _log_seeds, mending.segment),
    "operation": Decoder(_operation, _operation_seeds, is_value=True),
    "stat-cache": Decoder(_of_file(_stat_cache), _cache_seeds, mending.stat_cache),
    "bundle-header": Decoder(header_from_bytes, _header_seeds, is_value=True),
    "bundle": Decoder(
        _of_file(_bundle), lambda: [mending.bundle(_header_seeds()[0])], mending.bundle
    ),
    "format": Decoder(
        lambda data: parse_format(data, "format"),
        lambda: [Format(1).to_bytes(), Format(1, ("a",), ("b",), ("c",)).to_bytes()],
    ),
    "config": Decoder(_config, _config_seeds),
    "authorized-keys": Decoder(
        _of_text(parse_line),
        _texts(
            _KEY_LINE,
            b'dm-role="write",dm-dots="a/*,b/c",from="10.0.0.0/8",restrict ' + _KEY_LINE,
            b'command="dm serve --stdio" ' + _KEY_LINE,
        ),
        errors=(BadKeyLine,),
    ),
    "known-hosts": Decoder(
        _of_file(lambda path: look_up_host((path,), "example.org", 2222)),
        _texts(
            b"example.org " + _KEY_LINE + b"\n",
            b"|1|aGFzaGhhc2hoYXNoaGFzaGhhc2g=|aGFzaGhhc2hoYXNoaGFzaGhhc2g= " + _KEY_LINE,
            b"@cert-authority *.org " + _KEY_LINE + b"\n@revoked [example.org]:2222 " + _KEY_LINE,
        ),
    ),
    "allowed-signers": Decoder(
        _of_file(read_allowed_signers),
        _texts(b'me@x namespaces="dmsync",valid-before="20301231Z" ' + _KEY_LINE + b"\n"),
    ),
    "signature": Decoder(parse_signature, _texts(_SIGNATURE)),
    "url": Decoder(
        _of_text(_url), _texts(b"ssh://me@host:22/path", b"me@host:path", b"admin/apples", b"14d")
    ),
    "revision": Decoder(
        _of_text(_revision),
        _texts(b"master~3^2", b"HEAD@{1.day.ago}", b"a..b", b"v1.0:path/x", b":/message", b"a...b"),
    ),
    "command": Decoder(
        _of_text(_asked),
        _texts(b"dm serve --stdio", b"dm --home /srv/x serve --stdio", b"'/a b/dm' serve --stdio"),
    ),
}
