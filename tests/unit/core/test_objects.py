"""Entries and commits: exact bytes, and refusal of everything that is not exactly right."""

import pytest

from dmsync.core.encoding import decode, encode
from dmsync.core.ids import Kind, ObjectId, object_id
from dmsync.core.objects import (
    ROOT_ENTRY,
    Commit,
    Entry,
    EntryKind,
    Layout,
    commit_from_bytes,
    entry_from_value,
)
from dmsync.errors import BadObject

ID = ObjectId(bytes(range(32)))
FILE = Entry(b"f", EntryKind.FILE, 0o644, 1, 2, -3, 5, ID, Layout.SINGLE)


def changed(entry: Entry, position: int, value: object) -> tuple[object, ...]:
    fields = list(entry.to_value())
    fields[position] = value
    return tuple(fields)


@pytest.mark.parametrize(
    "entry",
    [
        FILE,
        Entry(b"\xff\x01", EntryKind.DIRECTORY, 0o1777, tree=ID),
        Entry(b"e", EntryKind.DIRECTORY, 0o700),
        Entry(b"l", EntryKind.SYMLINK, 0o777, link_target=b"../../etc/passwd"),
        Entry(b"p", EntryKind.FIFO, 0o600),
        Entry(b"c", EntryKind.CHARACTER_DEVICE, 0o600, device=(1, 3)),
        Entry(b"z", EntryKind.FILE, 0o600, size=2**40, layout=Layout.ZERO, sparse=True),
        Entry(b"h", EntryKind.FILE, 0o600, size=1, content=ID, layout=Layout.FIXED, tree=ID,
              hardlink=b"a/b", xattrs=((b"user.a", b""), (b"user.b", b"x")), extensions=((2, b"?"),)),
    ],
)  # fmt: skip
def test_entry_round_trips(entry: Entry) -> None:
    assert entry_from_value(decode(encode(entry.to_value()))) == entry


@pytest.mark.parametrize(
    "name", [b"", b".", b"..", b"a/b", b"/", b"a\0b", b"x" * 256, "text", None, 1]
)
def test_unsafe_name_is_refused(name: object) -> None:
    if name == b"":
        return  # only the root entry; a page refuses it (test_pages)
    with pytest.raises(BadObject):
        entry_from_value(changed(FILE, 0, name))


@pytest.mark.parametrize(
    ("position", "value"),
    [
        (1, 6), (1, -1), (2, 0o10000), (2, -1), (3, 2**32), (5, 2**63), (6, None),
        (6, (5, ID, 2, None, 0)), (6, (5, ID[:31], 1, None, 0)), (6, (0, ID, 1, None, 0)),
        (6, (5, b"", 0, None, 0)), (6, (-1, ID, 1, None, 0)), (6, (5, ID, 1, None, 2)),
        (6, (2**63, ID, 1, None, 0)), (7, b"a//b"), (7, b"../x"), (7, b"/x"),
        (8, ((b"b", b""), (b"a", b""))), (8, ((b"", b""),)), (9, ((1, b""),)), (9, ((2, b""), (2, b""))),
    ],
)  # fmt: skip
def test_bad_field_is_refused(position: int, value: object) -> None:
    with pytest.raises(BadObject):
        entry_from_value(changed(FILE, position, value))


def test_commit_round_trips_and_its_id_is_pinned() -> None:
    commit = Commit(
        ROOT_ENTRY, (), "a <a@b>", "a <a@b>", 1, 60, "héllo", (("k", "v"),), ((0, "root"),)
    )
    data = commit.to_bytes()
    assert commit_from_bytes(data) == commit
    assert object_id(Kind.COMMIT, data).hex() == (
        "098b76cf06a7b10c0fc9eb429462fb74e4bca1e1170ab75891c0c91ec2e8e92a"
    )


@pytest.mark.parametrize(
    "junk", [b"", b"\xc1", b"\x90", b"\x81\x01\x02", encode(1), encode((1,) * 12)]
)
def test_bytes_that_are_no_commit_are_refused(junk: bytes) -> None:
    with pytest.raises(BadObject):
        commit_from_bytes(junk)


def test_commit_with_a_parent_twice_is_refused() -> None:
    commit = Commit(ROOT_ENTRY, (ID, ID), "a", "a", 0, 0, "")
    with pytest.raises(BadObject):
        commit_from_bytes(commit.to_bytes())


@pytest.mark.parametrize(
    "data",
    [b"\xcd\x00\x01", b"\xcb" + bytes(8), b"\xc3", b"\x81\x01\x01", b"\x92\x01", b"\x01\x01", b"\x91" * 17 + b"\x01"],
)  # fmt: skip
def test_encoding_that_is_not_canonical_is_refused(data: bytes) -> None:
    with pytest.raises(BadObject):
        decode(data)


def test_ids_of_equal_bytes_differ_by_kind() -> None:
    assert len({object_id(kind, b"x") for kind in Kind}) == len(Kind)
