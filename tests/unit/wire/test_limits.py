"""Every limit of protocol/limits.toml one below, at and one above it; a limit without a check here
fails a test. What is over a limit is refused by a typed error before anything is made of it.
"""

import asyncio
import tempfile
import tomllib
import tracemalloc
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dmsync.core import delta, encoding, names, objects, pages, records
from dmsync.core.encoding import decode, encode
from dmsync.core.ids import Kind, ObjectId
from dmsync.core.objects import ROOT_ENTRY, Commit, Entry, EntryKind, commit_from_bytes
from dmsync.core.pages import DIRECTORY, MANIFEST, Child, Page, Span, decode_page, encode_page
from dmsync.core.records import BaseSlice, Encoding, Record, encode_record, parse_record
from dmsync.engine.session import Session
from dmsync.engine.sync_incoming import Incoming, PlannedKeys
from dmsync.engine.sync_opening import open_dot
from dmsync.engine.sync_pull import list_remote_dots
from dmsync.engine.sync_records import joined_records, send_plan_and_wait
from dmsync.engine.sync_tags import ReceivedSignatures
from dmsync.errors import (
    BadBundle,
    BadObject,
    DmError,
    NetworkError,
    NotADmServer,
    ProtocolError,
    VersionMismatch,
)
from dmsync.transports.admission import Admission, ServerLimits
from dmsync.transports.ssh_library import TRANSPORT_OPTIONS
from dmsync.wire import limits
from dmsync.wire.bundle_header import BUNDLE_MAGIC, BundleHeader, header_from_bytes
from dmsync.wire.connection import Connection, Role
from dmsync.wire.frames import HEADER, Flag, Frame, FrameType
from dmsync.wire.messages import (
    Ack,
    DotsReply,
    DotValue,
    Failure,
    Hello,
    Intent,
    KnownReply,
    Message,
    Ping,
    Plan,
    PlanReply,
    Push,
    Refs,
    RefsReply,
    RefValue,
    Shared,
    Signatures,
    frame_from_message,
    message_from_frame,
)
from dmsync.wire.windows import ReceiveWindow, SendWindow
from tests.support.streams import Script
from tests.support.virtual_time import run_in_virtual_time

from .test_frames import DOT, HELLO, ID, TRANSFER, bytes_of, opened

ROOT = Path(__file__).parents[3]
TABLES: dict[str, dict[str, Any]] = tomllib.loads((ROOT / "protocol/limits.toml").read_text())
LIMITS = {name: value for table in TABLES.values() for name, value in table.items()}
ELSEWHERE = frozenset({"tree"})
"""Tables whose limits are of trees: tests/unit/engine checks them on trees."""

Check = Callable[[int, pytest.MonkeyPatch], None]
CHECKS: dict[str, Check] = {}
OFFSETS = (-1, 0, 1)


def check(*covered: str) -> Callable[[Check], Check]:
    """The function checks these limits, given by how much to miss them."""

    def note(function: Check) -> Check:
        for name in covered:
            assert name not in CHECKS
            CHECKS[name] = function
        return function

    return note


def judged(offset: int, action: Callable[[], object], error: type[DmError] = ProtocolError) -> None:
    """`action` is taken up to the limit and refused above it."""
    if offset <= 0:
        action()
    else:
        with pytest.raises(error):
            action()


def parsed(kind: FrameType, *values: Any) -> Message:
    paged = (FrameType.REFS_REPLY, FrameType.DOTS_REPLY, FrameType.PLAN)
    flags = Flag.LAST if kind in paged else Flag.NONE
    return message_from_frame(Frame(kind, flags, encode(values)))


def ids(count: int) -> tuple[bytes, ...]:
    return tuple(number.to_bytes(32, "big") for number in range(count))


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize("name", [n for t, v in TABLES.items() if t not in ELSEWHERE for n in v])
def test_limit(name: str, offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert name in CHECKS, f"{name} is in protocol/limits.toml and no test misses it by one"
    CHECKS[name](offset, monkeypatch)


def test_limits_of_objects_are_those_of_the_specification() -> None:
    modules = (encoding, delta, records, pages, objects, names)
    for table in ("encoding", "objects"):
        for name, value in TABLES[table].items():
            found = {vars(module)[name] for module in modules if name in vars(module)}
            assert found == {value}, name


# --- frames ------------------------------------------------------------------------------------------


def header_taken(length: int, kind: int, *, greeted: bool) -> None:
    """Either role cuts its stream with the same buffer."""
    for role in Role:
        connection = opened(role) if greeted else Connection(role)
        start = limits.MAGIC if role is Role.CLIENT and not greeted else b""
        assert connection.receive(start + HEADER.pack(length, kind, 0)) == []


@check("HELLO_BYTES_MAX")
def hello_bytes(offset: int, _: Any) -> None:
    for kind in FrameType:
        size = min(limits.HELLO_BYTES_MAX, 8 if kind in (18, 19, 21) else 1 << 30) + offset
        judged(offset, lambda size=size, kind=kind: header_taken(size, kind, greeted=False))


@check("CONTROL_BYTES_MAX")
def control_bytes(offset: int, _: Any) -> None:
    for kind in set(FrameType) - {1, 12, 18, 19, 21}:
        size = limits.CONTROL_BYTES_MAX + offset
        judged(offset, lambda kind=kind, size=size: header_taken(size, kind, greeted=True))


@check("RECORDS_BYTES_MAX")
def records_bytes(offset: int, _: Any) -> None:
    size = limits.RECORDS_BYTES_MAX + offset
    judged(offset, lambda: header_taken(size, FrameType.RECORDS, greeted=True))


@check("RECORDS_BYTES_JOINED")
def records_joined(offset: int, _: Any) -> None:
    parts = [bytes(limits.RECORDS_BYTES_JOINED - 100), bytes(100 + offset)]
    frames = list(joined_records(parts))
    assert len(frames) == (1 if offset <= 0 else 2)


@pytest.mark.parametrize("kind", FrameType)
def test_four_gibibytes_are_refused_at_their_header(kind: FrameType) -> None:
    connection = opened(Role.SERVER)
    tracemalloc.start()
    with pytest.raises(ProtocolError):
        connection.receive(HEADER.pack(2**32 - 1, kind, 0))
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()


# --- opening -------------------------------------------------------------------------------------------


@check("VERSION_MIN", "VERSION_MAX")
def versions(offset: int, _: Any) -> None:
    newer = replace(HELLO, version_min=limits.VERSION_MAX + offset, version_max=9)
    older = replace(HELLO, version_min=0, version_max=limits.VERSION_MIN - offset)
    for hello in (newer, older):
        for role in Role:
            connection = Connection(role)
            connection.send(HELLO)
            start = limits.MAGIC if role is Role.CLIENT else b""
            data = start + bytes_of(hello)
            judged(offset, lambda c=connection, d=data: c.receive(d), VersionMismatch)


@check("BANNER_BYTES_MAX")
def banner(offset: int, _: Any) -> None:
    said = b"x" * (limits.BANNER_BYTES_MAX + offset) + limits.MAGIC
    judged(offset, lambda: Connection(Role.CLIENT).receive(said), NotADmServer)


@check("CAPABILITIES_MAX")
def capabilities(offset: int, _: Any) -> None:
    count = limits.CAPABILITIES_MAX + offset
    for field, item in ((2, ("a", "1")), (3, "a"), (7, ("a", 1))):
        values: list[Any] = [1, 1, (), (), "agent", bytes(16), 1, ()]
        values[field] = (item,) * count
        judged(offset, lambda v=tuple(values): parsed(FrameType.HELLO, *v))


# --- messages -----------------------------------------------------------------------------------------


@check("KNOWN_IDS_MAX")
def known_ids(offset: int, _: Any) -> None:
    count = limits.KNOWN_IDS_MAX + offset
    judged(offset, lambda: parsed(FrameType.KNOWN, ids(count)))
    judged(offset, lambda: parsed(FrameType.KNOWN_REPLY, bytes(count)))


@check("PLAN_ENTRIES_MAX")
def plan_entries(offset: int, _: Any) -> None:
    count = limits.PLAN_ENTRIES_MAX + offset
    judged(offset, lambda: parsed(FrameType.PLAN, 0, bytes(count), bytes(8 * count), count, 1))
    bits = bytes((count + 7) // 8)
    judged(offset, lambda: parsed(FrameType.PLAN_REPLY, 0, count, bits))


def planning() -> Incoming:
    """The part of Incoming that plans go through, of a store that has nothing."""
    incoming = Incoming.__new__(Incoming)
    incoming._planned = incoming._plan_total = incoming.resumed_count = 0
    incoming._expected = incoming._commit_keys = incoming._hollow_keys = PlannedKeys()
    incoming._reveal = True
    incoming.quarantine = SimpleNamespace(keys_here=lambda keys, stored: set())  # type: ignore[assignment]
    return incoming


@check("PLAN_OBJECTS_MAX")
def plan_objects(offset: int, _: Any) -> None:
    total = limits.PLAN_OBJECTS_MAX + offset
    plan = Plan(0, b"\0", bytes(8), total, 1, last=False)
    judged(offset, lambda: planning().take_plan(plan))


@pytest.mark.parametrize(
    "plan",
    [
        Plan(1, b"\0", bytes(8), 2, 1),
        Plan(0, b"\0", bytes(8), 0, 1),
        Plan(0, b"\0", bytes(8), 2, 1),
        Plan(0, b"\0\0", bytes(16), 1, 1, last=False),
        Plan(2**63 - 1, b"\0", bytes(8), 2**63 - 1, 1),
    ],
)
def test_plans_that_do_not_add_up_are_refused(plan: Plan) -> None:
    with pytest.raises(ProtocolError):
        planning().take_plan(plan)


@pytest.mark.parametrize(
    "message",
    [
        RefsReply(DOT, "", "a", "", "u", None, 1, 1, (), last=False),
        DotsReply("", (), last=False),
        Plan(0, b"", b"", 5, 5, last=False),
    ],
)
def test_an_empty_page_that_is_not_the_last_is_refused(message: Message) -> None:
    """Pages without end would cost the receiver something each and never reach a limit."""
    with pytest.raises(ProtocolError):
        message_from_frame(frame_from_message(message))


@check("REFS_PAGE_MAX")
def refs_page(offset: int, _: Any) -> None:
    refs = (("branch/b", ID, None),) * (limits.REFS_PAGE_MAX + offset)
    judged(
        offset,
        lambda: parsed(FrameType.REFS_REPLY, DOT, "", "a", "", "u", None, 1, 1, refs),
    )


def pages_of(values: list[Any], page: Callable[[tuple[Any, ...], bool], Message]) -> bytes:
    size = 2000
    return b"".join(
        bytes_of(page(tuple(values[first : first + size]), first + size >= len(values)))
        for first in range(0, len(values), size)
    )


def client_store() -> Any:
    return SimpleNamespace(catalog=SimpleNamespace(cluster_id=lambda: bytes(16), epoch=lambda: 1))


async def _asked_refs(said: bytes) -> Any:
    async with Session(Script(said), Role.CLIENT) as session:
        return await open_dot(session, client_store(), Refs(None, None, "a", Intent.PULL))


@check("REFS_MAX")
def refs_in_all(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "REFS_MAX", 5000)
    values = [RefValue(f"branch/z{n}", ID) for n in range(5000 + offset)]
    said = limits.MAGIC + bytes_of(HELLO)
    said += pages_of(
        values, lambda page, last: RefsReply(DOT, "", "a", "", "u", None, 1, 1, page, last=last)
    )
    judged(offset, lambda: asyncio.run(_asked_refs(said)))


@check("DOTS_MAX")
def dots_in_all(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dmsync.engine.sync_pull.DOTS_MAX", 5000)
    values = [DotValue(DOT, "", f"d{n}", None, 1) for n in range(5000 + offset)]
    said = limits.MAGIC + bytes_of(HELLO)
    said += pages_of(values, lambda page, last: DotsReply("", page, last=last))
    judged(offset, lambda: asyncio.run(list_remote_dots(client_store(), Script(said))))


@check("REF_NAME_BYTES_MAX")
def ref_name(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "branch/".ljust(limits.REF_NAME_BYTES_MAX + offset, "b")
    assert not pytest.importorskip("dmsync.wire.messages").is_ref_name(name), "names are shorter"
    monkeypatch.setattr("dmsync.wire.messages.check_ref_name", lambda text: text)
    refs = ((name, ID, None),)
    judged(
        offset,
        lambda: parsed(FrameType.REFS_REPLY, DOT, "", "a", "", "u", None, 1, 1, refs),
    )


def push_with(updates: Any = (), frontier: Any = ()) -> Message:
    return parsed(FrameType.PUSH, TRANSFER, TRANSFER, DOT, None, "a", 0, 0, updates, frontier)


@check("UPDATES_MAX")
def updates(offset: int, _: Any) -> None:
    count = limits.UPDATES_MAX + offset
    judged(offset, lambda: push_with((("branch/b", 1, None, ID, None, 0),) * count))
    outcomes = (("branch/b", 0, None, None, None, "", ""),) * count
    judged(offset, lambda: parsed(FrameType.RESULT, TRANSFER, outcomes, 1, 1))


@check("WANTS_MAX")
def wants(offset: int, _: Any) -> None:
    asked = ids(limits.WANTS_MAX + offset)
    judged(offset, lambda: parsed(FrameType.FETCH, TRANSFER, DOT, asked, ()))


@check("FRONTIER_MAX")
def frontier(offset: int, _: Any) -> None:
    held = ids(limits.FRONTIER_MAX + offset)
    judged(offset, lambda: parsed(FrameType.FETCH, TRANSFER, DOT, (), held))
    judged(offset, lambda: push_with((), held))


@check("CONTENT_MAX")
def content(offset: int, _: Any) -> None:
    asked = ids(limits.CONTENT_MAX + offset)
    judged(offset, lambda: parsed(FrameType.FETCH, TRANSFER, DOT, (), (), 0, asked))


@check("ABSENT_MAX")
def absent(offset: int, _: Any) -> None:
    lacking = ids(limits.ABSENT_MAX + offset)
    judged(offset, lambda: parsed(FrameType.FETCH, TRANSFER, DOT, (), (), 0, (), lacking))


@check("SUBDOTS_MAX")
def subdots(offset: int, _: Any) -> None:
    kept = tuple(f"s{n}" for n in range(limits.SUBDOTS_MAX + offset))
    judged(offset, lambda: parsed(FrameType.FETCH, TRANSFER, DOT, (), (), 0, (), (), kept))
    judged(
        offset,
        lambda: parsed(FrameType.REFS_REPLY, DOT, "", "a", "", "u", None, 1, 1, (), 0, kept),
    )


@check("SIGNATURES_PAGE_MAX")
def signatures_page(offset: int, _: Any) -> None:
    page = ((ID, b"x"),) * (limits.SIGNATURES_PAGE_MAX + offset)
    judged(offset, lambda: parsed(FrameType.SIGNATURES, TRANSFER, page))


@check("SIGNATURE_BYTES_MAX")
def signature_bytes(offset: int, _: Any) -> None:
    page = ((ID, b"x" * (limits.SIGNATURE_BYTES_MAX + offset)),)
    judged(offset, lambda: parsed(FrameType.SIGNATURES, TRANSFER, page))


ARMOUR = b"-----BEGIN SSH SIGNATURE-----\n"


@check("SIGNATURES_BYTES_MAX")
def signatures_bytes(offset: int, _: Any) -> None:
    received, whole = ReceivedSignatures(), ARMOUR.ljust(limits.SIGNATURE_BYTES_MAX, b"x")
    count = limits.SIGNATURES_BYTES_MAX // len(whole)
    received.take(Signatures(TRANSFER, ((ID, whole),) * (count - 1)), TRANSFER)
    last = whole + b"x" if offset > 0 else whole[: len(whole) + offset]
    judged(offset, lambda: received.take(Signatures(TRANSFER, ((ID, last),)), TRANSFER))


@check("SIGNATURES_PER_OBJECT_MAX")
def signatures_of_one(offset: int, _: Any) -> None:
    """What is too many is dropped, not refused."""
    received = ReceivedSignatures()
    count = limits.SIGNATURES_PER_OBJECT_MAX + offset
    made = tuple((ID, ARMOUR + b"%d" % number) for number in range(count))
    received.take(Signatures(TRANSFER, made), TRANSFER)
    catalog: Any = SimpleNamespace(signatures=lambda dot, target: [])
    assert len(received.events(catalog, DOT)) == min(count, limits.SIGNATURES_PER_OBJECT_MAX)


@check("DOTS_PAGE_MAX")
def dots_page(offset: int, _: Any) -> None:
    dots = ((DOT, "", "d", None, 1),) * (limits.DOTS_PAGE_MAX + offset)
    judged(offset, lambda: parsed(FrameType.DOTS_REPLY, "", dots))


@check("COLLABORATORS_MAX")
def collaborators(offset: int, _: Any) -> None:
    users = ("eve",) * (limits.COLLABORATORS_MAX + offset)
    judged(offset, lambda: parsed(FrameType.SHARED, users))
    assert offset > 0 or message_from_frame(frame_from_message(Shared(users)))


@check("NAME_CHARS_MAX")
def name_chars(offset: int, _: Any) -> None:
    name = "n" * (limits.NAME_CHARS_MAX + offset)
    judged(offset, lambda: parsed(FrameType.REFS, None, None, name, 0, None))
    judged(offset, lambda: parsed(FrameType.REFS, None, name, "a", 0, None))
    judged(offset, lambda: parsed(FrameType.REFS_REPLY, DOT, name, "a", "", name, None, 1, 1, ()))


@check("TEXT_CHARS_MAX")
def text_chars(offset: int, _: Any) -> None:
    text = "x" * (limits.TEXT_CHARS_MAX + offset)
    judged(offset, lambda: parsed(FrameType.ERROR, "c", text, "", "{}", 0))
    judged(offset, lambda: parsed(FrameType.ERROR, "c", "", text, "{}", 0))


@check("FACTS_CHARS_MAX")
def facts_chars(offset: int, _: Any) -> None:
    facts = "x" * (limits.FACTS_CHARS_MAX + offset)
    judged(offset, lambda: parsed(FrameType.ERROR, "c", "", "", facts, 0))
    assert isinstance(message_from_frame(frame_from_message(Failure("c", facts * 2))), Failure)


# --- flow -----------------------------------------------------------------------------------------------


@check("EAGER_BYTES_MAX")
def eager_bytes(offset: int, _: Any) -> None:
    """A sender's limit: beyond it, it asks for the inventory first."""
    from dmsync.engine.sync_records import RECORD_HEADER_BYTES_GUESS, Outgoing, PlannedObject

    stored: Any = SimpleNamespace(unverified_records=lambda ids: {})
    outgoing = Outgoing(stored)
    size = limits.EAGER_BYTES_MAX - RECORD_HEADER_BYTES_GUESS + offset
    outgoing.plan.append(PlannedObject(Kind.CHUNK, ID, size, None))
    assert outgoing.is_small() == (offset <= 0)


@check("INFLIGHT_BYTES_MAX")
def inflight_bytes(offset: int, _: Any) -> None:
    sending, receiving = SendWindow(), ReceiveWindow()
    size = limits.INFLIGHT_BYTES_MAX - 100
    sending.sent(size, 1)
    assert sending.has_room(100 + offset) == (offset <= 0)
    receiving.received(size, 1)
    judged(offset, lambda: receiving.received(100 + offset, 1))


def test_credits_come_back_with_acks() -> None:
    window = ReceiveWindow()
    for _ in range(5):
        window.received(limits.INFLIGHT_BYTES_MAX, 1)
        window.made_durable(1.0)
    with pytest.raises(ProtocolError):
        SendWindow(bytes_sent=10, records_sent=1).acknowledged(Ack(1, 11, 1))


@check("PLAN_PAGES_INFLIGHT_MAX")
def plan_pages(offset: int, _: Any) -> None:
    """A sender's limit; a receiver's queue is bounded in bytes."""
    most = 0
    unanswered = 0

    class Peer:
        async def send(self, page: Plan) -> None:
            nonlocal most, unanswered
            unanswered += 1
            most = max(most, unanswered)

        async def expect(self, kind: Any) -> PlanReply:
            nonlocal unanswered
            unanswered -= 1
            return PlanReply(0, 0, b"")

    count = limits.PLAN_PAGES_INFLIGHT_MAX + offset
    outgoing: Any = SimpleNamespace(
        pages=lambda eager: [Plan(0, b"", b"", 0, 0)] * count, take_inventory=lambda reply: None
    )
    asyncio.run(send_plan_and_wait(Peer(), outgoing))  # type: ignore[arg-type]
    assert most == min(count, limits.PLAN_PAGES_INFLIGHT_MAX) and unanswered == 0


@check("REQUESTS_INFLIGHT_MAX")
def requests_inflight(offset: int, _: Any) -> None:
    asked = bytes_of(Refs(None, None, "a", Intent.LIST))
    count = limits.REQUESTS_INFLIGHT_MAX + offset
    judged(offset, lambda: asyncio.run(_flooded(bytes_of(HELLO) + asked * count)))


async def _flooded(said: bytes) -> None:
    async with Session(Script(said, ends=False), Role.SERVER) as session:
        for _ in range(20):
            await asyncio.sleep(0)
        while session.poll() is not None:
            pass


@check("ACK_BYTES")
def ack_bytes(offset: int, _: Any) -> None:
    window = ReceiveWindow()
    window.received(limits.ACK_BYTES + offset, 1)
    assert window.is_ack_due(0.0) == (offset >= 0)


@check("ACK_INTERVAL_S")
def ack_interval(offset: int, _: Any) -> None:
    window = ReceiveWindow()
    window.received(1, 1)
    assert window.is_ack_due(limits.ACK_INTERVAL_S + offset / 1000) == (offset >= 0)


# --- bundles ---------------------------------------------------------------------------------------------


def bundle_header(**changes: Any) -> bytes:
    values: dict[str, Any] = {
        "cluster_id": bytes(16),
        "epoch": 1,
        "seq": 1,
        "dot": DOT,
        "namespace": "",
        "name": "a",
        "head": None,
        "refs": (),
        "prerequisites": (),
        "commits_count": 1,
        "hollow_count": 0,
        "records_count": 1,
    }
    values.update(changes)
    fields = (values[name] for name in values)
    return encode((1, (), *fields))


@check("BUNDLE_REFS_MAX")
def bundle_refs(offset: int, _: Any) -> None:
    refs = (("branch/b", ID, None),) * (limits.BUNDLE_REFS_MAX + offset)
    judged(offset, lambda: header_from_bytes(bundle_header(refs=refs)), BadBundle)
    assert isinstance(header_from_bytes(bundle_header()), BundleHeader)


@check("BUNDLE_HEADER_BYTES_MAX")
def bundle_header_bytes(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from dmsync.engine import bundles

    header = bundle_header(prerequisites=ids(100))
    monkeypatch.setattr(bundles, "BUNDLE_HEADER_BYTES_MAX", len(header) - offset)
    monkeypatch.setattr(bundles, "_check_hash", lambda file, path, end: None)
    with tempfile.TemporaryFile() as file:
        file.write(BUNDLE_MAGIC + len(header).to_bytes(4, "big") + header + bytes(100))
        file.seek(0)
        judged(offset, lambda: bundles._opened(file, "x"), BadBundle)


# --- deadlines --------------------------------------------------------------------------------------------


class Peer:
    """A stream that says `said`, and `again` every `every_s`; takes what is written unless `deaf`."""

    def __init__(
        self, said: bytes, again: bytes = b"", every_s: float = 1e9, *, deaf: bool = False
    ) -> None:
        self._said, self._again, self._every_s, self._deaf = said, again, every_s, deaf
        self.heard = bytearray()

    async def read(self, n: int) -> bytes:
        if not self._said:
            await asyncio.sleep(self._every_s)
            self._said = self._again
        data, self._said = self._said[:n], self._said[n:]
        return data

    async def write(self, data: bytes) -> None:
        while self._deaf:
            await asyncio.sleep(1e9)
        self.heard += data

    async def aclose(self) -> None:
        return None


async def _served(peer: Peer, work: Callable[[Session], Any], role: Role = Role.SERVER) -> DmError:
    try:
        async with Session(peer, role) as session:
            await work(session)
    except DmError as exc:
        return exc
    raise AssertionError("no error")


async def receive_all(session: Session) -> None:
    while True:
        await session.receive()


def given_up(
    monkeypatch: pytest.MonkeyPatch,
    peer: Peer,
    work: Callable[[Session], Any] = receive_all,
    role: Role = Role.SERVER,
) -> float:
    """After how many seconds a session gives a peer up. Raises what is no NetworkError."""
    error, elapsed_s = run_in_virtual_time(
        _served(peer, work, role), monkeypatch, "dmsync.engine.session"
    )
    assert isinstance(error, NetworkError), error
    return elapsed_s


def within(elapsed_s: float, limit_s: float) -> None:
    """The watch looks five times a second; saying why, and waiting for the end, take DRAIN_S."""
    assert limit_s <= elapsed_s <= limit_s + 12, (elapsed_s, limit_s)


PUSHING = bytes_of(HELLO) + b"".join(
    bytes_of(message)
    for message in (
        Refs(None, None, "a", Intent.PUSH),
        Push(TRANSFER, TRANSFER, DOT, None, "a", True, False, (), ()),
        Plan(0, b"\0", bytes(8), 1, 1),
    )
)
"""A client that is to send records now."""


@check("HANDSHAKE_TIMEOUT_S")
def handshake(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_s = limits.HANDSHAKE_TIMEOUT_S + offset
    monkeypatch.setattr("dmsync.engine.session.HANDSHAKE_TIMEOUT_S", limit_s)
    within(given_up(monkeypatch, Peer(b"")), limit_s)
    trickle = Peer(HEADER.pack(1000, 1, 0), b"x", 1.0)
    within(given_up(monkeypatch, trickle), limit_s)


@check("IDLE_TIMEOUT_S")
def idle(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One second less often than the limit is silence, one second more often is not."""
    peer = Peer(PUSHING, bytes_of(Ping()), limits.IDLE_TIMEOUT_S + offset - 0.5)
    elapsed_s = given_up(monkeypatch, peer)
    within(elapsed_s, limits.NO_PROGRESS_TIMEOUT_S if offset <= 0 else limits.IDLE_TIMEOUT_S)


@check("PING_INTERVAL_S")
def pings(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(PUSHING)
    given_up(monkeypatch, peer)
    due = limits.IDLE_TIMEOUT_S / limits.PING_INTERVAL_S
    assert abs(bytes(peer.heard).count(bytes_of(Ping())) - due) <= 1


@check("NO_PROGRESS_TIMEOUT_S")
def no_progress(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    limit_s = limits.NO_PROGRESS_TIMEOUT_S + offset
    monkeypatch.setattr("dmsync.engine.session.NO_PROGRESS_TIMEOUT_S", limit_s)
    within(given_up(monkeypatch, Peer(PUSHING, bytes_of(Ping()), 5.0)), limit_s)


@check("WORK_TIMEOUT_S")
def no_work(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client between its requests, and a server that proves what came, may take long."""
    limit_s = limits.WORK_TIMEOUT_S + offset
    monkeypatch.setattr("dmsync.engine.session.WORK_TIMEOUT_S", limit_s)
    asking = bytes_of(HELLO) + bytes_of(Refs(None, None, "a", Intent.PUSH))
    within(given_up(monkeypatch, Peer(asking, bytes_of(Ping()), 50.0)), limit_s)


@check("WORK_BYTES_PER_S")
def work_of_many_bytes(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that has much to prove gets longer."""

    async def push(session: Session) -> None:
        session.work_bytes = 1000 * (limits.WORK_BYTES_PER_S + offset)
        await session.send(HELLO, Refs(None, None, "a", Intent.PUSH))
        await session.send(Push(TRANSFER, TRANSFER, DOT, None, "a", True, False, (), ()))
        await session.expect(Hello)
        await session.expect(RefsReply)
        await session.receive()

    said = limits.MAGIC + bytes_of(HELLO)
    said += bytes_of(RefsReply(DOT, "", "a", "", "u", None, 1, 1, ()))
    peer = Peer(said, bytes_of(Ping()), 20.0)
    elapsed_s = given_up(monkeypatch, peer, push, Role.CLIENT)
    within(elapsed_s, limits.WORK_TIMEOUT_S + 1000)


@check("PROGRESS_BYTES_MIN")
def progress_bytes(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A frame that comes in portions of fewer bytes than that in the time given is no progress."""
    portion = bytes(limits.PROGRESS_BYTES_MIN + offset)
    every_s = limits.NO_PROGRESS_TIMEOUT_S - 1
    monkeypatch.setattr("dmsync.engine.session.IDLE_TIMEOUT_S", 1000.0)
    start = HEADER.pack(4 * len(portion), FrameType.RECORDS, 0)
    peer = Peer(PUSHING + start, portion, every_s)
    elapsed_s = 0.0
    try:
        elapsed_s = given_up(monkeypatch, peer)
    except AssertionError:  # the frame was completed; zeros are no records' frame after it
        assert offset >= 0
        return
    assert offset < 0
    within(elapsed_s, limits.NO_PROGRESS_TIMEOUT_S)


def test_a_trickle_of_single_bytes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    start = HEADER.pack(1_000_000, FrameType.RECORDS, 0)
    peer = Peer(PUSHING + start, b"x", 1.0)
    within(given_up(monkeypatch, peer), limits.NO_PROGRESS_TIMEOUT_S)


def test_a_peer_that_reads_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Though it is heard: whoever is writing is woken, and what it holds is freed."""

    async def answer(session: Session) -> None:
        await session.receive()
        await session.send(KnownReply(b"\0"))

    peer = Peer(bytes_of(HELLO), bytes_of(Ping()), 5.0, deaf=True)
    within(given_up(monkeypatch, peer, answer), limits.NO_PROGRESS_TIMEOUT_S)
    silent = Peer(bytes_of(HELLO), deaf=True)
    within(given_up(monkeypatch, silent, answer), limits.IDLE_TIMEOUT_S)


def test_a_flood_of_pings_costs_one_pong(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = Peer(bytes_of(HELLO) + bytes_of(Ping()) * 100_000, deaf=False)
    given_up(monkeypatch, peer)
    assert bytes(peer.heard).count(HEADER.pack(0, FrameType.PONG, 0)) <= 3


def test_a_server_that_proves_a_push_may_be_silent_but_for_heartbeats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from dmsync.wire.messages import Result, Update

    async def push(session: Session) -> None:
        await session.send(HELLO, Refs(None, None, "a", Intent.PUSH))
        await session.send(Push(TRANSFER, TRANSFER, DOT, None, "a", True, False, (), ()))
        await session.send(Plan(0, b"", b"", 0, 0, eager=True), Update(TRANSFER, 0))
        await session.expect(Hello)
        await session.expect(RefsReply)
        await session.receive()
        await session.expect(Result)

    from dmsync.wire.messages import Ready

    said = limits.MAGIC + bytes_of(HELLO)
    said += bytes_of(RefsReply(DOT, "", "a", "", "u", None, 1, 1, ()))
    said += bytes_of(Ready(TRANSFER, 100))
    peer = Peer(said, bytes_of(Ping()), 20.0)
    within(given_up(monkeypatch, peer, push, Role.CLIENT), limits.WORK_TIMEOUT_S)


# --- SSH --------------------------------------------------------------------------------------------------


def admitted(count: int, chance: float, sources: int = 1000) -> int:
    """How many of so many connections are let in that never log in."""
    admission = Admission(ServerLimits(), lambda: chance)
    return sum(
        admission.admits(f"10.0.{n % sources // 250}.{n % sources % 250}") for n in range(count)
    )


@check("UNAUTHENTICATED_FREE")
def unauthenticated_free(offset: int, _: Any) -> None:
    count = limits.UNAUTHENTICATED_FREE + offset
    assert admitted(count, chance=0.0) == min(count, limits.UNAUTHENTICATED_FREE)


@check("UNAUTHENTICATED_REFUSED_PERCENT")
def unauthenticated_share(offset: int, _: Any) -> None:
    chance = (limits.UNAUTHENTICATED_REFUSED_PERCENT - offset) / 100
    free = limits.UNAUTHENTICATED_FREE
    assert admitted(free + 1, chance) == (free if offset > 0 else free + 1)


@check("UNAUTHENTICATED_MAX")
def unauthenticated_all(offset: int, _: Any) -> None:
    count = limits.UNAUTHENTICATED_MAX + offset
    assert admitted(count, chance=0.99999) == min(count, limits.UNAUTHENTICATED_MAX)


@check("UNAUTHENTICATED_PER_SOURCE_MAX")
def unauthenticated_of_one(offset: int, _: Any) -> None:
    count = limits.UNAUTHENTICATED_PER_SOURCE_MAX + offset
    most = limits.UNAUTHENTICATED_PER_SOURCE_MAX
    assert admitted(count, chance=0.99999, sources=1) == min(count, most)


@check("CONNECTIONS_MAX")
def connections(offset: int, _: Any) -> None:
    admission = Admission(ServerLimits(), lambda: 1.0)
    let_in = 0
    for _number in range(limits.CONNECTIONS_MAX + offset):
        if admission.admits("10.0.0.1"):
            admission.authenticated("10.0.0.1")
            let_in += 1
    assert let_in == min(limits.CONNECTIONS_MAX, limits.CONNECTIONS_MAX + offset)


@check("CONNECTIONS_PER_USER_MAX")
def connections_of_one_user(offset: int, _: Any) -> None:
    from dmsync.transports.ssh_server import _Connection

    already = Counter(eve=limits.CONNECTIONS_PER_USER_MAX - 1 + offset)
    server: Any = SimpleNamespace(
        settings=SimpleNamespace(limits=ServerLimits()), connections_of=already
    )
    connection: Any = _Connection(server)
    refused: list[Any] = []
    connection._connection = SimpleNamespace(disconnect=lambda *why: refused.append(why))
    connection._count_user(SimpleNamespace(user="eve", fingerprint="x"))
    assert len(refused) == (offset > 0)


@check("SESSIONS_PER_CONNECTION_MAX")
def sessions(offset: int, _: Any) -> None:
    import asyncssh

    from dmsync.transports.ssh_server import _Connection

    server: Any = SimpleNamespace(settings=SimpleNamespace(limits=ServerLimits()))
    connection = _Connection(server)
    connection.sessions_count = limits.SESSIONS_PER_CONNECTION_MAX - 1 + offset
    if offset <= 0:
        assert connection.session_requested() is not None
    else:
        with pytest.raises(asyncssh.ChannelOpenError):
            connection.session_requested()


@check("LOGIN_TIMEOUT_S", "KEEPALIVE_INTERVAL_S", "KEEPALIVES_MAX")
def given_to_asyncssh(offset: int, _: Any) -> None:
    """asyncssh counts these: tests/e2e/test_transports.py lets connections run into them."""
    assert ServerLimits().login_timeout_s == limits.LOGIN_TIMEOUT_S
    assert TRANSPORT_OPTIONS["keepalive_interval"] == limits.KEEPALIVE_INTERVAL_S
    assert TRANSPORT_OPTIONS["keepalive_count_max"] == limits.KEEPALIVES_MAX - 1


# --- values and frames -----------------------------------------------------------------------------------


@check("NESTING_MAX")
def nesting(offset: int, _: Any) -> None:
    value: Any = 1
    for _level in range(encoding.NESTING_MAX + offset):
        value = (value,)
    judged(offset, lambda: decode(encode(value)), BadObject)


@check("ITEMS_MAX")
def items(offset: int, _: Any) -> None:
    inner = (b"",) * 1000 + (b"x" * 4000,)
    whole, left = divmod(encoding.ITEMS_MAX + offset - 1001, 1001)
    value = (*(inner,) * whole, b"z", *(b"",) * (999 - whole), (b"",) * left)
    data = encode(value)
    assert len(data) > 1 << 20
    judged(offset, lambda: decode(data, items_max=encoding.ITEMS_MAX), BadObject)


@check("WINDOW_BYTES_MAX")
def window_bytes(offset: int, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = delta.compress(b"x" * 5000)  # its window is its size
    monkeypatch.setattr(delta, "WINDOW_BYTES_MAX", 5000 - offset)
    judged(offset, lambda: delta.decompress(frame, 5000), BadObject)


@check("SIMILAR_PAGES_MAX")
def similar_pages(offset: int, _: Any) -> None:
    slices = (BaseSlice(bytes(8), 0),) * (records.SIMILAR_PAGES_MAX + offset)
    data = encode_record(Record(Kind.CHUNK, Encoding.SIMILAR, 10, b"x", slices))
    judged(offset, lambda: parse_record(data), BadObject)


@check("STEPS_MAX")
def steps(offset: int, _: Any) -> None:
    """A longer chain is kept as a full frame, not refused: tests/unit/storage/test_quarantine.py."""
    from dmsync.storage import quarantine

    assert quarantine.STEPS_MAX == records.STEPS_MAX


# --- objects ----------------------------------------------------------------------------------------------


def record_of(kind: Kind, raw_bytes: int) -> bytes:
    return encode_record(Record(kind, Encoding.ZSTD, raw_bytes, b"x"))


@check("CHUNK_BYTES_MAX")
def chunk_bytes(offset: int, _: Any) -> None:
    size = pages.CHUNK_BYTES_MAX + offset
    judged(offset, lambda: parse_record(record_of(Kind.CHUNK, size)), BadObject)
    span = encode_page(Page(MANIFEST, 0, (Span(size, ID),)))
    judged(offset, lambda: decode_page(span, MANIFEST), BadObject)


@check("PAGE_BYTES_MAX", "XATTR_SLACK_BYTES")
def page_bytes(offset: int, _: Any) -> None:
    size = pages.PAGE_BYTES_MAX + pages.XATTR_SLACK_BYTES + offset
    judged(offset, lambda: parse_record(record_of(Kind.PAGE, size)), BadObject)


@check("PAGE_ITEMS_MAX")
def page_items(offset: int, _: Any) -> None:
    count = pages.PAGE_ITEMS_MAX + offset
    names_ = [b"%06d" % n for n in range(count)]
    entries = tuple(Entry(name, EntryKind.FILE, 0o644) for name in names_)
    children = tuple(Child(name, ID, 1) for name in names_)
    for kind, level, items_ in (
        (DIRECTORY, 0, entries),
        (DIRECTORY, 1, children),
        (MANIFEST, 0, (Span(1, ID),) * count),
    ):
        page = encode_page(Page(kind, level, items_))
        judged(offset, lambda page=page, kind=kind: decode_page(page, kind), BadObject)


@check("PAGE_DEPTH_MAX")
def page_depth(offset: int, _: Any) -> None:
    page = encode_page(Page(DIRECTORY, pages.PAGE_DEPTH_MAX + offset, (Child(b"a", ID, 1),)))
    judged(offset, lambda: decode_page(page, DIRECTORY), BadObject)


def commit_with(**changes: Any) -> bytes:
    made = Commit(ROOT_ENTRY, (), "a", "a", 1, 0, "")
    return replace(made, **changes).to_bytes()


def commit_judged(offset: int, **changes: Any) -> None:
    data = commit_with(**changes)
    judged(offset, lambda: commit_from_bytes(data), BadObject)


@check("PARENTS_MAX")
def parents(offset: int, _: Any) -> None:
    count = objects.PARENTS_MAX + offset
    commit_judged(offset, parents=tuple(map(ObjectId, ids(count))))


@check("MESSAGE_BYTES_MAX")
def message_bytes(offset: int, _: Any) -> None:
    commit_judged(offset, message="m" * (objects.MESSAGE_BYTES_MAX + offset))


@check("METADATA_BYTES_MAX")
def metadata_bytes(offset: int, _: Any) -> None:
    commit_judged(offset, metadata=(("k", "v" * (objects.METADATA_BYTES_MAX - 1 + offset)),))


@check("PERSON_BYTES_MAX")
def person_bytes(offset: int, _: Any) -> None:
    commit_judged(offset, author="a" * (objects.PERSON_BYTES_MAX + offset))
    commit_judged(offset, committer="ü" * (objects.PERSON_BYTES_MAX // 2) + "a" * max(0, offset))


def test_a_hundred_thousand_parents_are_refused_at_once() -> None:
    data = commit_with(parents=ids(100_000))
    with pytest.raises(BadObject):
        commit_from_bytes(data)
    same = ObjectId(bytes(32))
    with pytest.raises(BadObject):
        commit_from_bytes(commit_with(parents=(same, same)))
