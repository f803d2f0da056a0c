"""Entries, commits and tags: the values a dot's history is made of (protocol/OBJECTS.md 3, 5, 6).

Everything decoded here may come from a hostile peer: each decoder bounds and checks every field
and raises BadObject; nothing unsafe survives decoding.
"""

from dataclasses import field, replace
from enum import IntEnum
from typing import Any, Final

from dmsync.core.encoding import ITEMS_MAX, decode, encode
from dmsync.core.ids import ID_BYTES, Kind, ObjectId
from dmsync.core.names import check_tag_name
from dmsync.core.values import plain_value_type, value_type
from dmsync.errors import BadObject, InvalidName

NAME_BYTES_MAX: Final = 255
LINK_TARGET_BYTES_MAX: Final = 4095
PATH_BYTES_MAX: Final = 4096
TREE_DEPTH_MAX: Final = 2048
XATTRS_MAX: Final = 64
XATTR_BYTES_MAX: Final = 64 * 1024
PARENTS_MAX: Final = 64
MESSAGE_BYTES_MAX: Final = 1024 * 1024
METADATA_BYTES_MAX: Final = 64 * 1024
PERSON_BYTES_MAX: Final = 1024
FILE_BYTES_MAX: Final = 2**63 - 1
HOLES_BYTES_MAX: Final = 1 << 46
"""Zeros of one file, which are hashed, too: 64 TiB take a minute, 8 EiB never end."""
EXTENSION_CRITICAL: Final = 1
"""Extension tags with this bit set must be understood; others may be ignored."""

_INT64: Final = 2**63
_UINT32: Final = 2**32


class EntryKind(IntEnum):
    FILE = 0
    DIRECTORY = 1
    SYMLINK = 2
    FIFO = 3
    CHARACTER_DEVICE = 4
    BLOCK_DEVICE = 5


class Layout(IntEnum):
    """How a file's bytes are cut; never compared, only verified."""

    EMPTY = 0
    SINGLE = 1
    """One chunk, whose id is the content id."""
    FIXED = 2
    """Tree of manifest pages over aligned chunks of one size."""
    CDC = 3
    """Tree of manifest pages over content-defined chunks."""
    ZERO = 4
    """Nothing but zeros, any size."""


_KINDS: Final = tuple(EntryKind)
_LAYOUTS: Final = tuple(Layout)
"""By number: looking an enum up costs half a microsecond."""


@value_type
class Entry:
    """One name in a directory.

    `name` is raw bytes without `/`. `tree` is the root page of a directory (None when empty) or
    of a FIXED/CDC file. `content` is the file's identity together with `size`, empty for EMPTY
    and ZERO layouts. `hardlink` is the bytewise-first path, from the dot's root, of the group
    this name belongs to, or empty. `sparse` says the file had holes: a hint for restore.
    """

    name: bytes
    kind: EntryKind
    mode: int
    uid: int = 0
    gid: int = 0
    mtime_ns: int = 0
    size: int = 0
    content: bytes = b""
    layout: Layout = Layout.EMPTY
    tree: ObjectId | None = None
    sparse: bool = False
    link_target: bytes = b""
    device: tuple[int, int] = (0, 0)
    hardlink: bytes = b""
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    extensions: tuple[tuple[int, bytes], ...] = ()

    def same_data(self, other: "Entry") -> bool:
        """True when both stand for the same kind and content, whatever their metadata."""
        return (
            self.kind == other.kind
            and self.size == other.size
            and self.content == other.content
            and (self.layout is Layout.ZERO) == (other.layout is Layout.ZERO)
            and self.link_target == other.link_target
            and self.device == other.device
        )

    def same_metadata(self, other: "Entry") -> bool:
        """True when mode, owner, time, link group and attributes are equal."""
        return (
            self.mode == other.mode
            and self.uid == other.uid
            and self.gid == other.gid
            and self.mtime_ns == other.mtime_ns
            and self.hardlink == other.hardlink
            and self.xattrs == other.xattrs
        )

    def renamed(self, name: bytes) -> "Entry":
        return replace(self, name=name)

    def to_value(self) -> tuple[Any, ...]:
        """The canonical array of this entry."""
        return (
            self.name,
            int(self.kind),
            self.mode,
            self.uid,
            self.gid,
            self.mtime_ns,
            _payload(self),
            self.hardlink,
            self.xattrs,
            self.extensions,
        )


def _payload(entry: Entry) -> Any:
    match entry.kind:
        case EntryKind.FILE:
            return (entry.size, entry.content, int(entry.layout), entry.tree, int(entry.sparse))
        case EntryKind.DIRECTORY:
            return entry.tree
        case EntryKind.SYMLINK:
            return entry.link_target
        case EntryKind.CHARACTER_DEVICE | EntryKind.BLOCK_DEVICE:
            return entry.device
        case EntryKind.FIFO:
            return None


def check_name(name: bytes) -> None:
    """Refuse names that could leave their directory or that no filesystem can hold.

    Raises:
        BadObject: empty, `.`, `..`, holding `/` or NUL, or over 255 bytes.
    """
    if (
        not 0 < len(name) <= NAME_BYTES_MAX
        or name in (b".", b"..")
        or b"/" in name
        or b"\0" in name
    ):
        raise BadObject(f"unsafe file name {name[:64]!r}")


def _integer(value: Any, low: int, high: int, what: str) -> int:
    if type(value) is not int or not low <= value < high:
        raise BadObject(f"{what} out of range")
    return value


def _bytes(value: Any, most: int, what: str) -> bytes:
    if type(value) is not bytes or len(value) > most:
        raise BadObject(f"{what} is not bytes of at most {most}")
    return value


def _text(value: Any, most: int, what: str) -> str:
    if type(value) is not str or len(value.encode("utf-8", "surrogatepass")) > most:
        raise BadObject(f"{what} is not text of at most {most} bytes")
    return value


def _array(value: Any, length: int, what: str) -> tuple[Any, ...]:
    if type(value) is not tuple or len(value) != length:
        raise BadObject(f"{what} is not an array of {length}")
    return value


def _optional_id(value: Any, what: str) -> ObjectId | None:
    if value is None:
        return None
    if type(value) is not bytes or len(value) != ID_BYTES:
        raise BadObject(f"{what} is not an object id")
    return ObjectId(value)


def _extensions(value: Any, what: str) -> tuple[tuple[int, bytes], ...]:
    if type(value) is not tuple or len(value) > 64:
        raise BadObject(f"{what}: extensions are not a short array")
    previous = -1
    for pair in value:
        tag, body = _array(pair, 2, what)
        _integer(tag, previous + 1, _UINT32, f"{what}: extension tag")
        _bytes(body, XATTR_BYTES_MAX, f"{what}: extension")
        if tag & EXTENSION_CRITICAL:
            raise BadObject(f"{what}: critical extension {tag} is not understood")
        previous = tag
    return value


def _check_path(path: bytes) -> None:
    if len(path) > PATH_BYTES_MAX:
        raise BadObject("hardlink path too long")
    for part in path.split(b"/"):
        check_name(part)


def entry_from_value(value: Any) -> Entry:
    """Build a checked Entry from a decoded array. Raises BadObject."""
    name, kind_number, mode, uid, gid, mtime_ns, payload, hardlink, xattrs, extensions = _array(
        value, 10, "entry"
    )
    if type(name) is not bytes:
        raise BadObject("entry name is not bytes")
    if name != b"":  # the root entry of a commit has no name; a directory page refuses it itself
        check_name(name)
    kind = _KINDS[_integer(kind_number, 0, len(_KINDS), "entry kind")]
    _integer(mode, 0, 0o10000, "mode")
    _integer(uid, 0, _UINT32, "uid")
    _integer(gid, 0, _UINT32, "gid")
    _integer(mtime_ns, -_INT64, _INT64, "mtime")
    _bytes(hardlink, PATH_BYTES_MAX, "hardlink")
    if extensions != ():
        _extensions(extensions, "entry")
    if hardlink:
        _check_path(hardlink)
    if xattrs != ():
        _check_xattrs(xattrs)
    size, content, layout = 0, b"", Layout.EMPTY
    tree: ObjectId | None = None
    sparse = False
    link_target = b""
    device = (0, 0)
    match kind:
        case EntryKind.FILE:
            size, content, layout, tree, sparse = _file_fields(payload)
        case EntryKind.DIRECTORY:
            tree = _optional_id(payload, "directory tree")
        case EntryKind.SYMLINK:
            link_target = _bytes(payload, LINK_TARGET_BYTES_MAX, "link target")
            if not link_target or b"\0" in link_target:
                raise BadObject("link target is empty or holds NUL")
        case EntryKind.CHARACTER_DEVICE | EntryKind.BLOCK_DEVICE:
            major, minor = _array(payload, 2, "device")
            device = (_integer(major, 0, _UINT32, "major"), _integer(minor, 0, _UINT32, "minor"))
        case EntryKind.FIFO:
            if payload is not None:
                raise BadObject("a fifo has no payload")
    return Entry(
        name,
        kind,
        mode,
        uid,
        gid,
        mtime_ns,
        size,
        content,
        layout,
        tree,
        sparse,
        link_target,
        device,
        hardlink,
        xattrs,
        extensions,
    )


def _check_xattrs(xattrs: Any) -> None:
    if type(xattrs) is not tuple or len(xattrs) > XATTRS_MAX:
        raise BadObject("extended attributes are not a short array")
    previous = b""
    for pair in xattrs:
        key, body = _array(pair, 2, "extended attribute")
        _bytes(key, NAME_BYTES_MAX, "attribute name")
        _bytes(body, XATTR_BYTES_MAX, "attribute")
        if not key > previous or b"\0" in key:
            raise BadObject("extended attributes are not sorted or not valid")
        previous = key


def _file_fields(payload: Any) -> tuple[int, bytes, Layout, ObjectId | None, bool]:
    """size, content, layout, tree, sparse of a file's payload."""
    size, content, layout_number, tree, sparse = _array(payload, 5, "file")
    _integer(size, 0, FILE_BYTES_MAX, "file size")
    layout = _LAYOUTS[_integer(layout_number, 0, len(_LAYOUTS), "layout")]
    has_content = layout is not Layout.EMPTY and layout is not Layout.ZERO
    if type(content) is not bytes or len(content) != (ID_BYTES if has_content else 0):
        raise BadObject("file content id does not fit its layout")
    root = _optional_id(tree, "file tree")
    if (root is not None) != (layout is Layout.FIXED or layout is Layout.CDC):
        raise BadObject("file tree does not fit its layout")
    if (layout is Layout.EMPTY) != (size == 0):
        raise BadObject("only an empty file has size 0")
    return size, content, layout, root, bool(_integer(sparse, 0, 2, "sparse hint"))


ROOT_ENTRY: Final = Entry(name=b"", kind=EntryKind.DIRECTORY, mode=0o755)
"""Root of a dot whose own directory carries no metadata (all but `--as-root`)."""


@plain_value_type
class Commit:
    """One state of a whole dot, with its place in history. The id is the hash of `to_bytes()`.

    Times are nanoseconds since 1970 UTC; offsets are minutes east of UTC. `metadata` is sorted by
    key, each key once. `user_names` and `group_names` map the ids used in the tree to names.
    """

    root: Entry
    parents: tuple[ObjectId, ...]
    author: str
    committer: str
    time_ns: int
    offset_minutes: int
    message: str
    metadata: tuple[tuple[str, str], ...] = ()
    user_names: tuple[tuple[int, str], ...] = ()
    group_names: tuple[tuple[int, str], ...] = ()
    extensions: tuple[tuple[int, bytes], ...] = field(default=())

    def to_bytes(self) -> bytes:
        return encode(
            (
                1,
                self.root.to_value(),
                self.parents,
                self.author,
                self.committer,
                self.time_ns,
                self.offset_minutes,
                self.message,
                self.metadata,
                self.user_names,
                self.group_names,
                self.extensions,
            )
        )


def commit_from_bytes(data: bytes, *, trusted: bool = False) -> Commit:
    """Decode and check a commit. Raises BadObject."""
    value = _array(decode(data, trusted=trusted, items_max=ITEMS_MAX), 12, "commit")
    if value[0] != 1:
        raise BadObject(f"commit version {value[0]!r} is not understood")
    root = entry_from_value(value[1])
    if root.name != b"" or root.kind is not EntryKind.DIRECTORY:
        raise BadObject("a commit's root is a nameless directory")
    parents = value[2]
    if (
        type(parents) is not tuple
        or len(parents) > PARENTS_MAX
        or len(set(parents)) != len(parents)
    ):
        raise BadObject("parents are not a short array of distinct ids")
    for parent in parents:
        if _optional_id(parent, "parent") is None:
            raise BadObject("a parent is missing")
    return Commit(
        root=root,
        parents=parents,
        author=_text(value[3], PERSON_BYTES_MAX, "author"),
        committer=_text(value[4], PERSON_BYTES_MAX, "committer"),
        time_ns=_integer(value[5], -_INT64, _INT64, "time"),
        offset_minutes=_integer(value[6], -1440, 1441, "offset"),
        message=_text(value[7], MESSAGE_BYTES_MAX, "message"),
        metadata=_metadata(value[8]),
        user_names=_names(value[9]),
        group_names=_names(value[10]),
        extensions=_extensions(value[11], "commit"),
    )


def _metadata(value: Any) -> tuple[tuple[str, str], ...]:
    if type(value) is not tuple:
        raise BadObject("metadata is not an array")
    total, previous = 0, ""
    for pair in value:
        key, text = _array(pair, 2, "metadata")
        total += len(_text(key, 1024, "metadata key")) + len(
            _text(text, METADATA_BYTES_MAX, "metadata value")
        )
        if not key > previous or total > METADATA_BYTES_MAX:
            raise BadObject("metadata is not sorted, not distinct or too long")
        previous = key
    return value


def _names(value: Any) -> tuple[tuple[int, str], ...]:
    if type(value) is not tuple or len(value) > 65_536:
        raise BadObject("name table is not an array")
    previous = -1
    for pair in value:
        number, name = _array(pair, 2, "name table")
        previous = _integer(number, previous + 1, _UINT32, "name table id")
        _text(name, 256, "name table name")
    return value


# --- tags and what is signed ---------------------------------------------------------------------


@plain_value_type
class Tag:
    """An annotated tag: a name given to the commit `target`, by whom, when and why.

    Times as in a Commit. A tag names a commit, never another tag.
    """

    target: ObjectId
    name: str
    tagger: str
    time_ns: int
    offset_minutes: int
    message: str
    extensions: tuple[tuple[int, bytes], ...] = field(default=())

    def to_bytes(self) -> bytes:
        return encode(
            (
                1,
                self.target,
                self.name,
                self.tagger,
                self.time_ns,
                self.offset_minutes,
                self.message,
                self.extensions,
            )
        )


def tag_from_bytes(data: bytes, *, trusted: bool = False) -> Tag:
    """Decode and check a tag. Raises BadObject."""
    value = _array(decode(data, trusted=trusted, items_max=ITEMS_MAX), 8, "tag")
    if type(value[0]) is not int or value[0] != 1:
        raise BadObject(f"tag version {value[0]!r:.40} is not understood")
    target = _optional_id(value[1], "tag target")
    if target is None:
        raise BadObject("a tag's target is missing")
    return Tag(
        target=target,
        name=_tag_name(value[2]),
        tagger=_text(value[3], PERSON_BYTES_MAX, "tagger"),
        time_ns=_integer(value[4], -_INT64, _INT64, "time"),
        offset_minutes=_integer(value[5], -1440, 1441, "offset"),
        message=_text(value[6], MESSAGE_BYTES_MAX, "message"),
        extensions=_extensions(value[7], "tag"),
    )


def _tag_name(value: Any) -> str:
    if type(value) is not str:
        raise BadObject("tag name is not text")
    try:
        return check_tag_name(value)
    except InvalidName as exc:
        raise BadObject(exc.message) from exc


def signed_message(kind: Kind, oid: ObjectId) -> bytes:
    """The text that a signature of a commit or tag signs (protocol/OBJECTS.md 7)."""
    return f"dm {_SIGNED[kind]} {oid.hex()}\n".encode("ascii")


_SIGNED: Final = {Kind.COMMIT: "commit", Kind.TAG: "tag"}
