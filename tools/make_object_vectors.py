"""Writes protocol/vectors/objects: golden objects and refused ones (protocol/OBJECTS.md).

Run it when the format gains a version, never to make a failing test pass.
"""

import json
from pathlib import Path

from dmsync.core.encoding import encode
from dmsync.core.ids import Kind, ObjectId, object_id
from dmsync.core.objects import ROOT_ENTRY, Commit, Entry, EntryKind, Layout, Tag
from dmsync.core.pages import DIRECTORY, MANIFEST, ZERO_RUN, Child, Page, Span, encode_page

TARGET = Path(__file__).resolve().parent.parent / "protocol" / "vectors" / "objects"
ID = ObjectId(bytes(range(32)))


def accepted() -> dict[str, tuple[str, Kind, bytes]]:
    """name -> (comment, kind, bytes)."""
    entries = (
        Entry(b"Hello", EntryKind.FILE, 0o644, 1000, 1000, 1, 5, ID, Layout.SINGLE),
        Entry(b"big", EntryKind.FILE, 0o600, size=2**33, content=ID, layout=Layout.FIXED, tree=ID),
        Entry(b"dir", EntryKind.DIRECTORY, 0o1777, tree=ID),
        Entry(b"fifo", EntryKind.FIFO, 0o600),
        Entry(b"link", EntryKind.SYMLINK, 0o777, mtime_ns=-1, link_target=b"../x"),
        Entry(b"null", EntryKind.CHARACTER_DEVICE, 0o666, device=(1, 3)),
        Entry(b"zeros\xff", EntryKind.FILE, 0, size=2**40, layout=Layout.ZERO, sparse=True,
              hardlink=b"a/zeros", xattrs=((b"user.k", b"v"),), extensions=((2, b"kept"),)),
    )  # fmt: skip
    spans = (Span(131072, ID), Span(10 * 131072, ZERO_RUN), Span(17, ID))
    commit = Commit(
        ROOT_ENTRY, (ID,), "Ada <a@example.org>", "Ada <a@example.org>", 1_790_000_000_000_000_001,
        -90, "first\n\nlonger, ünïcode", (("apples", "green"), ("empty", "")),
        ((0, "root"), (1000, "ada")), ((0, "root"),),
    )  # fmt: skip
    tag = Tag(ID, "v1.0-rc_2", "Ada <a@example.org>", 1_790_000_000_000_000_001, 120,
              "release\n\nünïcode", ((2, b"kept"),))  # fmt: skip
    return {
        "chunk-empty": ("no bytes", Kind.CHUNK, b""),
        "chunk": ("a chunk is its bytes", Kind.CHUNK, b"hello"),
        "directory-leaf": ("each kind of entry", Kind.PAGE,
                           encode_page(Page(DIRECTORY, 0, entries))),
        "directory-inner": ("children by first name", Kind.PAGE, encode_page(
            Page(DIRECTORY, 1, (Child(b"a", ID, 64), Child(b"m", ID, 1))))),
        "manifest-leaf": ("data, zero run, data", Kind.PAGE, encode_page(Page(MANIFEST, 0, spans))),
        "manifest-inner": ("children by bytes", Kind.PAGE, encode_page(
            Page(MANIFEST, 1, (Child(b"", ID, 2**26), Child(b"", ID, 5))))),
        "commit-root": ("no parents, empty tree", Kind.COMMIT,
                        Commit(ROOT_ENTRY, (), "a", "a", 0, 0, "").to_bytes()),
        "commit": ("every field", Kind.COMMIT, commit.to_bytes()),
        "tag": ("every field", Kind.TAG, tag.to_bytes()),
        "tag-least": ("the least a tag may hold", Kind.TAG, Tag(ID, "v", "", 0, 0, "").to_bytes()),
    }  # fmt: skip


def refused() -> dict[str, tuple[str, Kind, bytes]]:
    """name -> (comment, kind, bytes)."""

    def leaf(**wrong: object) -> bytes:
        fields: dict[str, object] = {
            "name": b"n", "kind": 0, "mode": 0o644, "uid": 0, "gid": 0, "mtime": 0,
            "payload": (5, bytes(ID), 1, None, 0), "hardlink": b"", "xattrs": (), "extensions": (),
        }  # fmt: skip
        fields.update(wrong)
        return encode((1, 0, (tuple(fields.values()),)))

    twice = Commit(ROOT_ENTRY, (ID, ID), "a", "a", 0, 0, "").to_bytes()
    entry = (b"n", 3, 0, 0, 0, 0, None, b"", (), ())
    return {
        "refused-name-dotdot": ("a name that leaves its directory", Kind.PAGE, leaf(name=b"..")),
        "refused-name-slash": ("a name with a slash", Kind.PAGE, leaf(name=b"a/b")),
        "refused-name-empty": ("an entry without a name", Kind.PAGE, leaf(name=b"")),
        "refused-name-nul": ("a name with NUL", Kind.PAGE, leaf(name=b"a\0")),
        "refused-name-256": ("a name of 256 bytes", Kind.PAGE, leaf(name=b"x" * 256)),
        "refused-hardlink-dotdot": ("a link group outside", Kind.PAGE, leaf(hardlink=b"../x")),
        "refused-mode": ("a mode with type bits", Kind.PAGE, leaf(mode=0o100644)),
        "refused-critical-extension": ("an unknown critical extension", Kind.PAGE,
                                       leaf(extensions=((1, b""),))),
        "refused-unsorted": ("names not in byte order", Kind.PAGE,
                             encode((1, 0, ((b"b", *entry[1:]), (b"a", *entry[1:]))))),
        "refused-twice": ("one name twice", Kind.PAGE, encode((1, 0, (entry, entry)))),
        "refused-float": ("a float", Kind.PAGE, b"\x93\x01\x00\xcb" + bytes(8)),
        "refused-long-integer": ("an integer not in its shortest form", Kind.PAGE,
                                 b"\x93\xcc\x01\x00\x90"),
        "refused-trailing": ("bytes after the value", Kind.PAGE, leaf() + b"\x00"),
        "refused-empty-page": ("a page without items", Kind.PAGE, encode((1, 0, ()))),
        "refused-chunk-2mib": ("a span longer than a chunk may be", Kind.PAGE,
                               encode((2, 0, ((2**21,), bytes(ID))))),
        "refused-commit-version": ("a commit of version 2", Kind.COMMIT,
                                   encode((2, *(None,) * 11))),
        "refused-commit-parent-twice": ("one parent twice", Kind.COMMIT, twice),
        "refused-commit-metadata": ("metadata not sorted", Kind.COMMIT,
                                    Commit(ROOT_ENTRY, (), "a", "a", 0, 0, "",
                                           (("b", ""), ("a", ""))).to_bytes()),
        "refused-tag-version": ("a tag of version 2", Kind.TAG, encode((2, *(None,) * 7))),
        "refused-tag-name": ("a name that means a range", Kind.TAG,
                             Tag(ID, "a..b", "a", 0, 0, "").to_bytes()),
        "refused-tag-name-slash": ("a name with a slash", Kind.TAG,
                                   Tag(ID, "a/b", "a", 0, 0, "").to_bytes()),
        "refused-tag-target": ("no target", Kind.TAG,
                               encode((1, None, "v", "a", 0, 0, "", ()))),
        "refused-tag-short-target": ("a target of 31 bytes", Kind.TAG,
                                     encode((1, bytes(31), "v", "a", 0, 0, "", ()))),
        "refused-tag-offset": ("an offset of more than a day", Kind.TAG,
                               Tag(ID, "v", "a", 0, 1441, "").to_bytes()),
        "refused-tag-extension": ("an unknown critical extension", Kind.TAG,
                                  Tag(ID, "v", "a", 0, 0, "", ((3, b""),)).to_bytes()),
        "refused-tag-trailing": ("bytes after the value", Kind.TAG,
                                 Tag(ID, "v", "a", 0, 0, "").to_bytes() + b"\0"),
    }  # fmt: skip


def main() -> None:
    TARGET.mkdir(parents=True, exist_ok=True)
    for expect, cases in (("object", accepted()), ("refused", refused())):
        for name, (comment, kind, data) in cases.items():
            case = {
                "spec": "OBJECTS.md",
                "comment": comment,
                "expect": expect,
                "kind": kind.name,
                "bytes": data.hex(),
            }
            if expect == "object":
                case["id"] = object_id(kind, data).hex()
            (TARGET / f"{name}.json").write_text(json.dumps(case, indent=1) + "\n")


if __name__ == "__main__":
    main()
