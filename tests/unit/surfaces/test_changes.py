"""Lines and JSON of changes: kinds, sizes, metadata in words, whatever names and values are."""

import pytest

from dmsync.core.objects import Entry, EntryKind, Layout
from dmsync.engine.differences import Change
from dmsync.surfaces.cli.changes import (
    change_line,
    kind_lines,
    metadata_fields,
    metadata_lines,
    stat_line,
    status_line,
)


def file(size: int = 5, **fields: object) -> Entry:
    given: dict[str, object] = {"mode": 0o644, "content": bytes(32), "layout": Layout.SINGLE}
    return Entry(b"f", EntryKind.FILE, size=size, **{**given, **fields})  # type: ignore[arg-type]


def changed(old: Entry, new: Entry) -> Change:
    return Change(b"f", "*", old, new, metadata_only=old.same_data(new))


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (Change(b"a\n", "+", None, file()), "+ a\\n (5 B)"),
        (Change(b"a", "-", file(), None), "- a (5 B)"),
        (Change(b"a", "*", file(), file(9)), "* a (5 B -> 9 B, at most 7 B differ)"),
        (Change(b"a", "*", file(), file(7)), "* a (5 B -> 7 B)"),
        (changed(file(), file(mode=0o600)), "* f (metadata)"),
        (Change(b"a", "R", file(), file(), b"\x1b", True), "R \\x1b -> a (metadata)"),
        (Change(b"a", "C", file(), file(), b"b", True), "C b -> a (5 B)"),
    ],
)
def test_lines_with_sizes(change: Change, line: str) -> None:
    assert change_line(change, stat=True, differing_bytes=7) == line
    assert change_line(change) == line.rpartition(" (")[0]


def test_totals_count_each_kind_once_and_a_copy_as_growth() -> None:
    changes = [
        Change(b"a", "C", file(), file(), b"b", True),
        Change(b"c", "R", file(), file(), b"d", True),
        Change(b"e", "*", file(100), file(90)),
    ]
    assert stat_line(changes, 100) == "1 changed, 1 renamed, 1 copied; -5 B"
    assert stat_line(changes, 40).endswith("; -5 B; at most 40 B differ")
    assert stat_line([], 0) == "no changes; +0 B"


def test_names_for_scripts_are_on_one_line_with_as_many_tabs_as_promised() -> None:
    assert status_line(Change(b"a\tb\n", "+", None, file())) == "+\ta\\tb\\n"
    assert status_line(Change(b"a", "R", file(), file(), b"\t")) == "R\t\\t\ta"


def test_metadata_in_words() -> None:
    old = file(uid=1, gid=2, mtime_ns=0, xattrs=((b"user.a", b"1"), (b"user.b\x1b", b"\x1b")))
    new = file(
        mode=0o4755, uid=3, mtime_ns=1, hardlink=b"x\x1b", xattrs=((b"user.a", b"2"), (b"user.c", b"")),
    )  # fmt: skip
    assert metadata_lines(changed(old, new)) == [
        "mode 0644 -> 4755",
        "owner 1:2 -> 3:0",
        "time 1970-01-01T00:00:00.000000000+00:00 -> 1970-01-01T00:00:00.000000001+00:00",
        "link group none -> x\\x1b",
        "attribute user.a changed",
        "attribute user.b\\x1b removed",
        "attribute user.c added",
    ]
    assert metadata_fields(changed(old, new))["owner"] == ["1:2", "3:0"]
    assert metadata_lines(changed(old, old)) == []
    assert metadata_lines(Change(b"a", "+", None, new)) == []


def test_kinds_and_link_targets() -> None:
    link = Entry(b"f", EntryKind.SYMLINK, 0o777, link_target=b"\x1b]0;x")
    other = Entry(b"f", EntryKind.SYMLINK, 0o777, link_target=b"there")
    assert kind_lines(changed(link, other), told=False) == ["symlink to \\x1b]0;x -> there"]
    assert kind_lines(changed(file(), other), told=False) == [
        "file -> symlink",
        "+ symlink to there",
    ]
    assert kind_lines(changed(file(), other), told=True) == ["+ symlink to there"]
    assert kind_lines(Change(b"f", "-", other, None), told=False) == ["- symlink to there"]
    assert kind_lines(changed(file(), file(9)), told=False) == []
