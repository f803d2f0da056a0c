from datetime import UTC, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmsync.core.revisions import (
    Ancestor,
    BranchBefore,
    Parent,
    Range,
    ReflogEntry,
    ReflogTime,
    Revision,
    Upstream,
    parse_revision,
    parse_revision_or_range,
    split_path,
    time_of,
)
from dmsync.errors import UsageError


@pytest.mark.parametrize(
    ("text", "base", "steps"),
    [
        ("HEAD", "HEAD", ()),
        ("@", "HEAD", ()),
        ("@^", "HEAD", (Parent(1),)),
        ("@{1}", "HEAD", (ReflogEntry(1),)),
        ("master", "master", ()),
        ("origin/master~3", "origin/master", (Ancestor(3),)),
        ("v1.0^", "v1.0", (Parent(1),)),
        ("x^^2~4^0", "x", (Parent(1), Parent(2), Ancestor(4), Parent(0))),
        ("x~", "x", (Ancestor(1),)),
        ("x@{u}^", "x", (Upstream(), Parent(1))),
        ("x@{2 hours ago}", "x", (ReflogTime("2 hours ago"),)),
        ("x@{2026-11-21 09:30}", "x", (ReflogTime("2026-11-21 09:30"),)),
        ("x^{}", "x", (Parent(0),)),
        ("x^{commit}~2", "x", (Parent(0), Ancestor(2))),
        ("@{-2}^", "HEAD", (BranchBefore(2), Parent(1))),
        ("stash/reset-20261121", "stash/reset-20261121", ()),
        (":/a..b fix^", ":/a..b fix^", ()),
    ],
)
def test_revisions(text, base, steps):
    assert parse_revision(text) == Revision(base, steps)


def test_id_prefixes():
    assert parse_revision("BEEF").id_prefix == "beef"
    assert parse_revision("bee").id_prefix is None
    assert parse_revision("0" * 64).id_prefix and not parse_revision("0" * 65).id_prefix


@pytest.mark.parametrize(
    "text",
    ["", "^", "~1", "x^-1", "x@{", "x@{}", "x@{ }", "x@{soon}", "x y", "x~99999999999", "-x", "x@y",
     "a/", "x^{tree}", "x^{", "x@{-1}", "@@{-1}", "@{-0}", "@{-99999999999}", ":/", ":/ ", "x\n", "é", "x~²", "x" * 2000, "x" + "^" * 300, "a..b", "@@"],
)  # fmt: skip
def test_bad_revisions_are_refused(text):
    with pytest.raises(UsageError):
        parse_revision(text)


@pytest.mark.parametrize(
    ("text", "left", "right", "symmetric"),
    [
        ("a..b", "a", "b", False),
        ("a...b", "a", "b", True),
        ("..b", "HEAD", "b", False),
        ("a..", "a", "HEAD", False),
        ("v1.0..v1.1", "v1.0", "v1.1", False),
    ],
)
def test_ranges(text, left, right, symmetric):
    expected = Range(Revision(left), Revision(right), symmetric)
    assert parse_revision_or_range(text) == expected


def test_range_without_ends_is_refused():
    for text in ("..", "...", "a..b..c", "a....b"):
        with pytest.raises(UsageError):
            parse_revision_or_range(text)


def test_the_text_of_a_message_has_no_range_and_no_steps():
    assert parse_revision_or_range(":/a..b^") == Revision(":/a..b^")
    assert parse_revision(":/a b").message_text == "a b"
    assert parse_revision("HEAD").message_text is None
    assert split_path(":/a b") == (Revision("HEAD"), "/a b")


def test_paths():
    assert split_path("HEAD~1:db/x:y") == (Revision("HEAD", (Ancestor(1),)), "db/x:y")
    assert split_path("a@{2026-11-21 09:30}:p")[1] == "p"
    assert split_path(":p") == (Revision("HEAD"), "p")
    with pytest.raises(UsageError):
        split_path("HEAD")


def test_times():
    now = 10**18
    at = 1_795_253_400 * 10**9
    assert time_of("now", now_ns=now, zone=UTC) == now
    assert time_of("yesterday", now_ns=now, zone=UTC) == now - 86_400 * 10**9
    assert time_of("3.weeks.ago", now_ns=now, zone=UTC) == now - 21 * 86_400 * 10**9
    assert time_of("2026-11-21T09:30:00Z", now_ns=now, zone=UTC) == at
    assert time_of("2026-11-21 10:30", now_ns=now, zone=timezone(timedelta(hours=1))) == at


@given(st.text(alphabet="aB0/.^~@{}u:-1 \n", max_size=20))
def test_any_text_is_parsed_or_refused(text):
    for parse in (parse_revision_or_range, split_path):
        try:
            parse(text)
        except UsageError:
            pass
