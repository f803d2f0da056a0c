"""Frames, messages and the order they may come in."""

import random
import tomllib
from pathlib import Path
from typing import Any

import pytest

from dmsync import errors
from dmsync.core import objects
from dmsync.core.encoding import encode
from dmsync.core.ids import DotId, ObjectId
from dmsync.errors import NotADmServer, ProtocolError, VersionMismatch
from dmsync.wire import limits
from dmsync.wire.connection import Connection, Role, State
from dmsync.wire.failures import error_from_failure, failure_from_error, printable
from dmsync.wire.frames import (
    HEADER,
    Flag,
    Frame,
    FrameBuffer,
    FrameType,
    encode_frame,
    payload_bytes_max,
)
from dmsync.wire.messages import (
    Ack,
    Bye,
    Done,
    DotsReply,
    DotValue,
    Failure,
    Fetch,
    Hello,
    Intent,
    KnownQuery,
    KnownReply,
    ListDots,
    Message,
    Ping,
    Plan,
    PlanReply,
    Pong,
    Push,
    Ready,
    Records,
    RefMode,
    RefOutcome,
    Refs,
    RefsReply,
    RefStatus,
    RefUpdate,
    RefValue,
    Result,
    Share,
    ShareAction,
    Shared,
    Signatures,
    Update,
    frame_from_message,
    message_from_frame,
)
from dmsync.wire.windows import ReceiveWindow, SendWindow

ROOT = Path(__file__).parents[3]
DOT = DotId(bytes(range(16)))
ID = ObjectId(bytes(range(32)))
OTHER = ObjectId(bytes(range(32, 64)))
TRANSFER = bytes(range(100, 116))
HELLO = Hello(1, 1, (("zstd", "1"),), (), "dmsync/0.1.0", bytes(16), 1, (("inflight-bytes", 9),))
MESSAGES: dict[str, Message] = {
    "hello": HELLO,
    "refs": Refs(DOT, "admin", "apples", Intent.PUSH, (1, 7)),
    "refs-by-name": Refs(None, None, "apples", Intent.PULL),
    "refs-reply": RefsReply(
        DOT, "admin", "apples", "admin", "me", "master", 7, 1, (RefValue("branch/b", ID, "master"),)
    ),
    "refs-reply-absent": RefsReply(None, "admin", None, "admin", "me", None, 7, 1, ()),
    "refs-reply-tags": RefsReply(
        DOT,
        "admin",
        "apples",
        "admin",
        "me",
        "master",
        7,
        1,
        (RefValue("tag/light", ID), RefValue("tag/v1.0", OTHER, None, ID)),
    ),
    "signatures": Signatures(TRANSFER, ((ID, b"-----BEGIN SSH SIGNATURE-----\n"), (OTHER, b"x"))),
    "list-dots": ListDots(),
    "share": Share(ShareAction.ADD, "ann"),
    "shared": Shared(("ann", "bob")),
    "dots-reply": DotsReply("admin", (DotValue(DOT, "admin", "apples", "master", 2),), last=False),
    "known": KnownQuery((ID, OTHER)),
    "known-reply": KnownReply(b"\0\2"),
    "push": Push(
        TRANSFER,
        TRANSFER,
        DOT,
        None,
        "apples",
        True,
        False,
        (RefUpdate("branch/master", RefMode.FF, None, ID, None, 2),),
        (OTHER,),
    ),
    "ready": Ready(TRANSFER, 1000),
    "plan": Plan(0, b"\0\1\2", bytes(24), 3, 5000, last=True, eager=True),
    "plan-reply": PlanReply(0, 3, b"\5"),
    "records": Records(b"\0\1\1x"),
    "ack": Ack(3, 100, 1000),
    "update": Update(TRANSFER, 3),
    "result": Result(
        TRANSFER,
        (RefOutcome("branch/master", RefStatus.STASHED, OTHER, ID, "branch/master-DIVERGED-1"),),
        9,
        1,
    ),
    "fetch": Fetch(TRANSFER, DOT, (ID,), (OTHER,)),
    "fetch-depth": Fetch(TRANSFER, DOT, (ID,), (), 3),
    "fetch-content": Fetch(TRANSFER, DOT, (), (OTHER,), 0, (ID,), (ID,), ("db", "__default__")),
    "refs-reply-hollow": RefsReply(
        DOT, "admin", "apples", "admin", "me", "master", 7, 1, (), True, last=True
    ),
    "refs-reply-subdots": RefsReply(
        DOT, "admin", "apples", "admin", "me", "master", 7, 1, (), False, ("db",)
    ),
    "result-hollow": Result(TRANSFER, (), 9, 1, 4),
    "plan-hollow": Plan(0, b"\4\2", bytes(16), 2, 700, last=True, eager=True),
    "done": Done(TRANSFER, 3, 2, 1),
    "ping": Ping(),
    "pong": Pong(),
    "error": Failure("diverged", "no", "try", '{"ahead": 1}', False),
    "bye": Bye(),
}


def frames_of(data: bytes) -> list[Frame]:
    buffer = FrameBuffer()
    buffer.handshaken = True
    buffer.feed(data)
    return list(buffer.frames())


def bytes_of(message: Message) -> bytes:
    return encode_frame(frame_from_message(message))


# --- vectors and round trips ---------------------------------------------------------------------------


def test_every_message_type_has_a_vector() -> None:
    assert {type(m).TYPE for m in MESSAGES.values()} == set(FrameType)


@pytest.mark.parametrize("name", MESSAGES)
def test_golden_frames(name: str) -> None:
    """protocol/vectors/wire/<name>.hex: the bytes of the message above, for ever."""
    golden = bytes.fromhex((ROOT / "protocol/vectors/wire" / f"{name}.hex").read_text())
    assert bytes_of(MESSAGES[name]) == golden
    assert [message_from_frame(f) for f in frames_of(golden)] == [MESSAGES[name]]


@pytest.mark.parametrize(
    "subdots", [("",), ("a/b",), ("..",), ("x" * 256,), ("\0",), (7,), "db", ("d",) * 129]
)
def test_what_is_no_subdot_is_refused(subdots: Any) -> None:
    fields = (TRANSFER, DOT, (), (), 0, (), (), subdots)
    with pytest.raises(ProtocolError):
        message_from_frame(Frame(FrameType.FETCH, Flag(0), encode(fields)))


def test_fields_beyond_the_known_ones_are_refused() -> None:
    fields = (TRANSFER, DOT, (), (), 0, (), (), None, 0)
    with pytest.raises(ProtocolError):
        message_from_frame(Frame(FrameType.FETCH, Flag(0), encode(fields)))
    with pytest.raises(ProtocolError):
        message_from_frame(Frame(FrameType.FETCH, Flag(0), encode(fields[:3])))


@pytest.mark.parametrize("name", MESSAGES)
def test_a_changed_byte_gives_a_message_or_a_protocol_error(name: str) -> None:
    data = bytes_of(MESSAGES[name])
    for at in range(len(data)):
        for mask in (1, 0x80, 0xFF):
            changed = data[:at] + bytes((data[at] ^ mask,)) + data[at + 1 :]
            try:
                for frame in frames_of(changed):
                    message_from_frame(frame)
            except ProtocolError:
                continue


def test_random_payloads_give_only_protocol_errors() -> None:
    rng = random.Random(1)
    for _ in range(20_000):
        frame = Frame(rng.choice(list(FrameType)), Flag(0), rng.randbytes(rng.randrange(40)))
        try:
            message_from_frame(frame)
        except ProtocolError:
            continue


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_frames_do_not_depend_on_how_the_stream_is_cut(size: int) -> None:
    data = b"".join(map(bytes_of, MESSAGES.values()))
    buffer = FrameBuffer()
    buffer.handshaken = True
    found = []
    for start in range(0, len(data), size):
        buffer.feed(data[start : start + size])
        found += [message_from_frame(frame) for frame in buffer.frames()]
    assert found == list(MESSAGES.values())


# --- bounds ----------------------------------------------------------------------------------------------


def test_limits_are_those_of_the_specification() -> None:
    tables = tomllib.loads((ROOT / "protocol/limits.toml").read_text())
    tree = tables.pop("tree")
    assert tree == {name: getattr(objects, name) for name in tree}
    elsewhere = ("encoding", "objects", "tree")  # test_limits.py compares those
    written = {
        k: v for name, table in tables.items() if name not in elsewhere for k, v in table.items()
    }
    assert written == {k: v for k, v in vars(limits).items() if k.isupper() and k != "MAGIC"}


@pytest.mark.parametrize("kind", FrameType)
def test_lengths_are_refused_at_the_header(kind: FrameType) -> None:
    most = payload_bytes_max(kind)
    assert frames_of(HEADER.pack(most, kind, 0)) == []
    with pytest.raises(ProtocolError):
        frames_of(HEADER.pack(most + 1, kind, 0))


def test_before_hello_every_frame_is_small() -> None:
    buffer = FrameBuffer()
    buffer.feed(HEADER.pack(limits.HELLO_BYTES_MAX + 1, FrameType.RECORDS, 0))
    with pytest.raises(ProtocolError):
        list(buffer.frames())


def test_unknown_types_are_skipped_only_when_they_may_be() -> None:
    assert frames_of(HEADER.pack(1, 200, Flag.MAY_IGNORE) + b"x" + bytes_of(Bye())) != []
    with pytest.raises(ProtocolError):
        frames_of(HEADER.pack(1, 200, 0) + b"x")


def refused(frame_type: FrameType, *values: Any, flags: Flag = Flag.NONE) -> None:
    with pytest.raises(ProtocolError):
        message_from_frame(Frame(frame_type, flags, encode(tuple(values))))


def test_fields_out_of_their_bounds_are_refused() -> None:
    ids = (bytes(ID),)
    refused(FrameType.KNOWN, ids * (limits.KNOWN_IDS_MAX + 1))
    refused(FrameType.KNOWN, (b"short",))
    refused(FrameType.KNOWN, ids, ids)
    refused(FrameType.KNOWN_REPLY, b"\3")
    refused(FrameType.READY, TRANSFER, -1)
    refused(FrameType.REFS, None, None, "../x", 0, None)
    refused(FrameType.REFS, None, None, "x" * 129, 0, None)
    refused(FrameType.REFS, None, None, "x", 9, None)
    refused(FrameType.PLAN, 0, b"\0", b"", 1, 1)
    refused(FrameType.PLAN, 0, b"\x09", bytes(8), 1, 1)
    refused(FrameType.PLAN_REPLY, 0, 9, b"\0")
    refused(FrameType.ACK, 1, 1, 1, flags=Flag.LAST)
    update = ("branch/../x", 1, None, bytes(ID), None, 0)
    refused(FrameType.PUSH, TRANSFER, TRANSFER, bytes(DOT), None, "x", 0, 0, (update,), ())
    refused(FrameType.PUSH, TRANSFER, TRANSFER, bytes(DOT), None, "x", 2, 0, (), ())


# --- order -------------------------------------------------------------------------------------------------


def opened(role: Role) -> Connection:
    connection = Connection(role)
    connection.send(HELLO)
    start = limits.MAGIC if role is Role.CLIENT else b""
    assert connection.receive(start + bytes_of(HELLO)) == [HELLO]
    return connection


@pytest.mark.parametrize("name", [n for n in MESSAGES if n not in ("hello", "error")])
def test_nothing_comes_before_hello(name: str) -> None:
    with pytest.raises(ProtocolError):
        Connection(Role.SERVER).receive(bytes_of(MESSAGES[name]))


SERVER_SEQUENCES = [
    (["refs", "known", "push", "plan", "records", "update", "refs"], True),
    (["list-dots", "refs", "known", "list-dots"], True),
    (["refs", "push", "records"], False),
    (["refs", "push", "plan", "plan"], False),
    (["refs", "push", "update"], False),
    (["push"], False),
    (["known"], False),
    (["refs", "records"], False),
    (["refs", "fetch", "push"], False),
    (["refs-reply"], False),
    (["hello"], False),
    (["refs", "push", "plan", "records", "fetch"], False),
    (["ping", "pong", "refs", "ping"], True),
]


@pytest.mark.parametrize(("names", "allowed"), SERVER_SEQUENCES)
def test_order_of_requests(names: list[str], allowed: bool) -> None:
    connection = opened(Role.SERVER)
    data = b"".join(bytes_of(MESSAGES[name]) for name in names)
    if allowed:
        assert len(connection.receive(data)) == len(names)
    else:
        with pytest.raises(ProtocolError):
            connection.receive(data)
        assert connection.state is State.CLOSED
        assert connection.receive(bytes_of(Ping())) == []


def test_answers_come_in_the_order_of_the_questions() -> None:
    client = opened(Role.CLIENT)
    client.send(MESSAGES["refs"])
    client.send(MESSAGES["known"])
    with pytest.raises(ProtocolError):
        client.receive(bytes_of(MESSAGES["known-reply"]))


@pytest.mark.parametrize("name", ["refs-reply", "result", "done", "ack", "plan", "records"])
def test_unasked_answers_are_refused(name: str) -> None:
    with pytest.raises(ProtocolError):
        opened(Role.CLIENT).receive(bytes_of(MESSAGES[name]))


def test_records_of_a_fetch_come_after_the_plan() -> None:
    client = opened(Role.CLIENT)
    client.send(MESSAGES["fetch"])
    with pytest.raises(ProtocolError):
        client.receive(bytes_of(MESSAGES["records"]))
    client = opened(Role.CLIENT)
    client.send(MESSAGES["fetch"])
    names = ["plan", "records", "records", "done"]
    assert len(client.receive(b"".join(bytes_of(MESSAGES[n]) for n in names))) == 4


def test_versions_must_overlap() -> None:
    newer = Hello(2, 3, (), (), "x", b"", 0, ())
    with pytest.raises(VersionMismatch, match=r"dmsync/2\.\.3"):
        Connection(Role.SERVER).receive(bytes_of(newer))


# --- opening -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 4096])
def test_banners_are_skipped_however_they_are_cut(size: int) -> None:
    client = Connection(Role.CLIENT)
    client.send(HELLO)
    data = b"Welcome to \x89DMS!\r\n" * 100 + limits.MAGIC + bytes_of(HELLO)
    found: list[Message] = []
    for start in range(0, len(data), size):
        found += client.receive(data[start : start + size])
    assert found == [HELLO]


@pytest.mark.parametrize(("extra", "allowed"), [(0, True), (1, False)])
def test_a_banner_has_at_most_64_kib(extra: int, allowed: bool) -> None:
    client = Connection(Role.CLIENT)
    client.send(HELLO)
    data = b"x" * (limits.BANNER_BYTES_MAX + extra) + limits.MAGIC + bytes_of(HELLO)
    if allowed:
        assert client.receive(data) == [HELLO]
    else:
        with pytest.raises(NotADmServer):
            client.receive(data)


def test_terminal_codes_of_a_stranger_are_escaped() -> None:
    client = Connection(Role.CLIENT)
    client.receive(b"\x1b]0;evil\x07sh: dm: not found")
    with pytest.raises(NotADmServer) as caught:
        client.receive_end()
    assert "\x1b" not in caught.value.message and "not found" in caught.value.message


# --- errors and windows ----------------------------------------------------------------------------------------


def test_errors_keep_their_type_and_facts() -> None:
    error = errors.Diverged("no\x1b[2J", hint="try", ahead=2, base="ab", raw=b"\1")
    back = error_from_failure(failure_from_error(error))
    assert type(back) is errors.Diverged
    assert back.facts == {"ahead": 2, "base": "ab", "raw": "01"}
    assert "\x1b" not in back.message and back.hint == "try"


@pytest.mark.parametrize("facts", ["[1]", "{", '{"message": 1, "a b": 2}', "null"])
def test_strange_errors_become_remote_failures(facts: str) -> None:
    error = error_from_failure(Failure("never-heard-of", "x", "", facts))
    assert type(error) is errors.RemoteFailure
    assert error.facts == {"remote_code": "never-heard-of"}


def test_a_peer_cannot_claim_that_we_were_interrupted() -> None:
    assert type(error_from_failure(Failure("interrupted", "x"))) is errors.RemoteFailure


def test_printable_keeps_text() -> None:
    assert printable("grüß dich\n") == "grüß dich\n"


def test_send_window_bounds_what_is_under_way() -> None:
    window = SendWindow(credits=100)
    assert window.has_room(500)  # alone
    window.sent(60, 1)
    assert window.has_room(40) and not window.has_room(41)
    window.acknowledged(Ack(1, 60, 0))
    assert window.has_room(100)
    with pytest.raises(ProtocolError):
        window.acknowledged(Ack(2, 60, 1))
    with pytest.raises(ProtocolError):
        window.acknowledged(Ack(0, 0, 1))


def test_receive_window_acknowledges_by_bytes_or_time() -> None:
    window = ReceiveWindow()
    assert not window.is_ack_due(100.0)
    window.received(10, 1)
    assert not window.is_ack_due(0.1) and window.is_ack_due(0.3)
    window.received(limits.ACK_BYTES, 5)
    assert window.is_ack_due(0.0)
    assert window.made_durable(0.0).records_durable == 6
