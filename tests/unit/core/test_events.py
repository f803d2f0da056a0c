from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dmsync.core import events as ev
from dmsync.core.encoding import decode, encode
from dmsync.core.ids import DotId, ObjectId
from dmsync.errors import BadObject, DmError, FormatUnsupported

VECTORS = Path(__file__).parents[3] / "protocol" / "vectors" / "events"
DOT, A, B, T = DotId(b"d" * 16), ObjectId(b"a" * 32), ObjectId(b"b" * 32), b"t" * 16

EXAMPLES: list[ev.Event] = [
    ev.StoreCreated(b"c" * 16, 7),
    ev.EpochStarted(8),
    ev.DotCreated(DOT, "admin", "shop", "me"),
    ev.DotRenamed(DOT, "admin", "store", ("admin", "shop")),
    ev.DotDeleted(DOT, DOT.hex() + "-1", True, (b"/srv/x", False, 5, 2**64 - 1)),
    ev.DotRestored(DOT, "admin", "shop"),
    ev.DotPurged(DOT),
    ev.CurrentDotSwitched(None, DOT),
    ev.HeadSwitched(DOT, "topic", "master"),
    ev.CommitsAdded(DOT, (A, B), T, ("btrfs", "snapshot", 1500)),
    ev.CommitsListed(DOT, (A, B), T),
    ev.CommitsThinned(DOT, (A,), "keep-last 5"),
    ev.CommitsForgotten(DOT, (A, B)),
    ev.DotScopeSet(DOT, ("db", "cache"), ("db",)),
    ev.SignatureAdded(DOT, A, b"-----BEGIN SSH SIGNATURE-----"),
    ev.RefChanged(DOT, "branch/master", None, A, "commit", "commit: é", "master", "topic"),
    ev.BranchRenamed(DOT, "old", "new", ("branch/topic",)),
    ev.WorkingSaved(DOT, "master", A, "checkout", B),
    ev.WorkingDropped(DOT, "master", A),
    ev.TreeAttached(DOT, b"/srv/\xff", True, 2**64 - 1, 12),
    ev.TreeDetached(DOT, (b"/srv/\xff", True, 2**64 - 1, 12)),
    ev.TreeSwitchStarted(DOT, "topic", A, None, "checkout", True),
    ev.TreeSwitchFinished(DOT, "topic"),
    ev.MergeStarted(
        DOT, "topic", "merge", A, B, (A,), B, (A, B), "join", ((b"db/f", "both changed", b"[]"),)
    ),
    ev.ConflictResolved(DOT, "topic", b"db/f", "theirs", b"", "open", b"[]"),
    ev.MergeEnded(DOT, "topic", "concluded", 41, ((b"db/f", "theirs", b"[]"),)),
    ev.RemoteAdded("origin", "ssh://host/srv", None),
    ev.RemoteRemoved(
        "origin", "ssh://host", None, ((DOT, "admin", "shop"),), ((DOT, "remote/origin/master", A),)
    ),
    ev.RemoteRenamed("origin", "backup"),
    ev.UpstreamSet(DOT, "origin", "admin", "shop", ("", "store")),
    ev.UpstreamRemoved(DOT, "origin", ("admin", "shop")),
    ev.RemoteObserved("origin", DOT, b"c" * 16, 7, 99),
    ev.TransferStarted(T, "push", "origin", DOT, "master"),
    ev.TransferFinished(T, "done", (("bytes", 5), ("error", None), ("ref", "branch/master"))),
    ev.UndoApplied(7, True),
    ev.GarbageCollected(DOT, (("commits", 2), ("bytes", 4096))),
    ev.CollaboratorAdded(DOT, "ann"),
    ev.CollaboratorRemoved(DOT, "ann"),
    ev.QuotaSet("team", 5 << 30, 1 << 20),
]


def vector_text(event: ev.Event) -> str:
    """One vector: a readable line, then the canonical bytes in hex."""
    return f"event: {event!r}\nspec: STORE.md 4\nbytes: {encode(ev.event_to_value(event)).hex()}\n"


def test_every_event_has_an_example():
    assert [type(event) for event in EXAMPLES] == list(get_args(ev.Event))


@pytest.mark.parametrize("event", EXAMPLES, ids=lambda event: type(event).__name__)
def test_event_has_the_bytes_of_its_vector_and_comes_back(event):
    vector = (VECTORS / f"{type(event).__name__}.txt").read_text()
    assert vector == vector_text(event)
    data = bytes.fromhex(vector.rpartition("bytes: ")[2])
    assert ev.event_from_value(decode(data)) == event


def test_operation_comes_back_and_numbers_its_events():
    operation = ev.Operation(5, -1, T, "commit", "me", tuple(EXAMPLES))
    assert ev.operation_from_value(decode(encode(operation.to_value()))) == operation
    assert [s.seq for s in operation.stored_events()][-1] == operation.last_seq == 4 + len(EXAMPLES)


@pytest.mark.parametrize(
    "event",
    [
        ev.HeadSwitched(DotId(b"short"), "x"),
        ev.HeadSwitched(DOT, "\udc80"),
        ev.HeadSwitched(DOT, "x" * 70_000),
        ev.RefChanged(DOT, "branch/x", None, A, "teleport"),
        ev.TreeAttached(DOT, b"", False, 1, 1),
        ev.TreeAttached(DOT, b"/x", False, 2**64, 1),
        ev.TransferFinished(T, "done", (("x", 2**63),)),
        ev.CommitsAdded(DOT, (ObjectId(b"x"),)),
    ],
)
def test_values_that_no_reader_would_take_are_not_written(event):
    with pytest.raises(BadObject):
        ev.event_to_value(event)


def test_events_of_a_newer_release_are_named():
    with pytest.raises(FormatUnsupported, match="999"):
        ev.event_from_value((999, 1, b""))
    with pytest.raises(FormatUnsupported, match="StoreCreated"):
        ev.event_from_value((1, 2, b"c" * 16, 7))


def test_old_version_is_upcast_one_step_at_a_time(monkeypatch):
    number, _, checks = ev._TYPES[ev.DotPurged]
    monkeypatch.setitem(ev._TYPES, ev.DotPurged, (number, 3, checks))
    monkeypatch.setitem(ev._BY_NUMBER, number, (ev.DotPurged, 3))
    monkeypatch.setitem(ev._UPCASTS, (number, 1), lambda fields: (*fields, DOT))
    monkeypatch.setitem(ev._UPCASTS, (number, 2), lambda fields: (fields[1],))
    assert ev.event_from_value((number, 1, b"x")) == ev.DotPurged(DOT)


@pytest.mark.parametrize("path", sorted((VECTORS / "v1").iterdir()), ids=lambda path: path.stem)
def test_first_versions_are_still_read(path):
    """Events of version 1 mean what they meant: what they replaced was not recorded then."""
    value = decode(bytes.fromhex(path.read_text().rpartition("bytes: ")[2]))
    event = ev.event_from_value(value)
    assert value[1] == 1 and type(event).__name__ == path.stem
    written = ev.event_to_value(event)
    assert written[1] == 2 and written[2 : len(value)] == value[2:]
    assert not any(written[len(value) :])


values = st.recursive(
    st.none() | st.integers(-(2**63), 2**64 - 1) | st.binary(max_size=40) | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=5).map(tuple),
    max_leaves=12,
)


@given(
    values, st.sampled_from([1, 10, 20, 21, 32, 33, 36, 41, 44, 51]), st.lists(values, max_size=7)
)
def test_hostile_values_raise_typed_errors_only(value, number, fields):
    for parse, given_value in (
        (ev.event_from_value, value),
        (ev.operation_from_value, value),
        (ev.event_from_value, (number, 1, *fields)),
        (ev.operation_from_value, (1, 0, T, "c", "a", value)),
    ):
        try:
            parse(given_value)
        except DmError:
            pass
