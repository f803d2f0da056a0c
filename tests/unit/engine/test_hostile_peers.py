"""Peers that lie: a client to a server, a server to a client. Each lie ends in a typed error and
changes nothing; what a client may not read it cannot learn of."""

import asyncio
import os
import struct
import time
import tracemalloc
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zstandard

from dmsync.core.delta import compress, compress_with_prefix
from dmsync.core.encoding import decode
from dmsync.core.ids import DotId, Kind, ObjectId, object_id, short_key
from dmsync.core.objects import ROOT_ENTRY, Commit
from dmsync.core.records import BaseSlice, Encoding, Record, encode_record
from dmsync.engine.session import Session
from dmsync.engine.sync_incoming import PlannedKeys
from dmsync.engine.sync_opening import hello
from dmsync.engine.sync_pull import FetchRequest, fetch
from dmsync.engine.sync_push import PushRequest, push
from dmsync.engine.sync_server import serve
from dmsync.errors import (
    BadObject,
    DmError,
    DotIdClash,
    DotNotFound,
    NetworkError,
    ObjectMissing,
    ProtocolError,
    RefConflict,
)
from dmsync.wire.connection import Role
from dmsync.wire.frames import encode_frame
from dmsync.wire.limits import INFLIGHT_BYTES_MAX, MAGIC
from dmsync.wire.messages import (
    Ack,
    Bye,
    Done,
    Fetch,
    Hello,
    Intent,
    KnownQuery,
    KnownReply,
    Message,
    Plan,
    PlanReply,
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
    Update,
    frame_from_message,
)
from tests.support.streams import Line, Script
from tests.support.sync_stores import Everything, Pair, noise

TRANSFER = bytes(range(16))
Talk = Callable[[Session], Awaitable[Any]]


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    monkeypatch.setattr("dmsync.engine.session.DRAIN_S", 0.1)
    made = Pair(str(tmp_path))
    yield made
    made.close()


def as_client(pair: Pair, talk: Talk) -> Any:
    """What `talk` returns; raises what the server answers."""

    async def client(stream: Any) -> Any:
        async with Session(stream, Role.CLIENT) as session:
            await session.send(hello(pair.local))
            await session.expect(Hello)
            return await talk(session)

    outcome = pair.run(client)
    if outcome.error is not None:
        raise outcome.error
    return outcome.result


async def name_dot(session: Session, name: str, dot: DotId | None = None) -> RefsReply:
    await session.send(Refs(dot, None, name, Intent.PUSH))
    return await session.expect(RefsReply)


def push_of(dot: DotId, new: ObjectId, *, create: bool = True, mode: RefMode = RefMode.FF) -> Push:
    update = RefUpdate("branch/master", mode, None, new)
    return Push(TRANSFER, os.urandom(16), dot, None, "apples", create, True, (update,), ())


def plan_of(records: list[tuple[Kind, ObjectId]], *, eager: bool = True) -> Plan:
    kinds = bytes(int(kind) for kind, _ in records)
    keys = b"".join(short_key(oid) for _, oid in records)
    return Plan(0, kinds, keys, len(records), 1, eager=eager)


def raw(kind: Kind, data: bytes) -> tuple[Kind, ObjectId, bytes]:
    record = Record(kind, Encoding.RAW, len(data), data)
    return kind, object_id(kind, data), encode_record(record)


def pushed(
    pair: Pair, dot: DotId, tip: ObjectId, objects: list[tuple[Kind, ObjectId, bytes]]
) -> Any:
    """Push these records as they are."""

    async def talk(session: Session) -> Any:
        await name_dot(session, "apples", dot)
        await session.send(push_of(dot, tip))
        await session.expect(Ready)
        await session.send(plan_of([(kind, oid) for kind, oid, _ in objects]))
        await session.send(Records(b"".join(record for _, _, record in objects)))
        await session.send(Update(TRANSFER, len(objects)))
        return await session.receive()

    return as_client(pair, talk)


def commit_of(*parents: ObjectId, message: str = "") -> tuple[Kind, ObjectId, bytes]:
    return raw(Kind.COMMIT, Commit(ROOT_ENTRY, parents, "a", "a", 1, 0, message).to_bytes())


def assert_untouched(pair: Pair, dot: DotId) -> None:
    assert pair.remote.catalog.dot(dot) is None
    assert not pair.remote.objects(dot).packs()


# --- a dot that one may not read ------------------------------------------------------------------


@pytest.fixture
def secret(pair: Pair) -> tuple[DotId, ObjectId, ObjectId]:
    """(dot, commit, chunk) of somebody else, on the server; `mallory` may use the rest."""
    dot = pair.remote.create_dot("secret", "alice")
    data = noise(5000, seed=9)
    commit = pair.remote.commit(dot, {"s": data})
    pair.access = Everything("mallory", "mallory", lambda space, name, verb: space == "mallory")
    return dot, commit, object_id(Kind.CHUNK, data)


def test_a_writer_of_one_dot_learns_nothing_of_another_by_questions(
    pair: Pair, secret: tuple[DotId, ObjectId, ObjectId]
) -> None:
    _, commit, chunk = secret
    mine = pair.local.create_dot("apples", "mallory")
    pair.local.commit(mine, {"a": b"1"})
    pair.push(mine)
    stranger = ObjectId(os.urandom(32))

    async def known(session: Session) -> bytes:
        await name_dot(session, "apples")
        await session.send(KnownQuery((commit, stranger)))
        return (await session.expect(KnownReply)).states

    assert as_client(pair, known) == b"\0\0"

    async def inventory(session: Session) -> bytes:
        await name_dot(session, "apples")
        await session.send(push_of(mine, stranger, create=False, mode=RefMode.STASH))
        await session.expect(Ready)
        asked = [(Kind.COMMIT, commit), (Kind.CHUNK, chunk), (Kind.CHUNK, stranger)]
        await session.send(plan_of(asked, eager=False))
        return (await session.expect(PlanReply)).bitmap

    assert as_client(pair, inventory) == b"\0"

    async def taken(session: Session) -> Message:
        await name_dot(session, "apples")
        await session.send(Fetch(TRANSFER, mine, (commit,), ()))
        return await session.receive()

    with pytest.raises(DmError) as of_theirs:
        as_client(pair, taken)
    commit = stranger
    with pytest.raises(DmError) as of_nobody:
        as_client(pair, taken)
    assert of_theirs.value.code == of_nobody.value.code
    assert of_theirs.value.message == of_nobody.value.message


def test_an_absent_dot_and_one_that_is_not_for_you_are_answered_alike(
    pair: Pair, secret: tuple[DotId, ObjectId, ObjectId]
) -> None:
    theirs = secret[0]

    def answers(dot: DotId, name: str) -> list[Any]:
        async def refs(session: Session) -> Any:
            await session.send(Refs(dot, "alice", name, Intent.PULL))
            reply = await session.expect(RefsReply)
            return reply.dot, reply.refs, reply.head, reply.namespace

        async def fetched(session: Session) -> Any:
            await session.send(Refs(dot, "alice", name, Intent.PULL))
            await session.expect(RefsReply)
            await session.send(Fetch(TRANSFER, dot, (ObjectId(bytes(32)),), ()))
            return await session.receive()

        found: list[Any] = [as_client(pair, refs)]
        with pytest.raises(DotNotFound) as refused:
            as_client(pair, fetched)
        return [*found, refused.value.message]

    assert answers(theirs, "secret") == answers(DotId(os.urandom(16)), "secret")
    absent = answers(DotId(os.urandom(16)), "nothing")
    assert absent == answers(theirs, "nothing")


def test_absent_and_forbidden_take_the_same_time(
    pair: Pair, secret: tuple[DotId, ObjectId, ObjectId]
) -> None:
    """The median of many questions in one session, in CPU time; asked in turns."""

    async def timed(session: Session) -> dict[str, list[float]]:
        took: dict[str, list[float]] = {"secret": [], "absent": []}
        for _ in range(300):
            for name in took:
                began = time.process_time()
                await session.send(Refs(None, "alice", name, Intent.PULL))
                await session.expect(RefsReply)
                took[name].append(time.process_time() - began)
        return took

    took = as_client(pair, timed)
    median = {name: sorted(times)[len(times) // 2] for name, times in took.items()}
    difference = abs(median["secret"] - median["absent"])
    assert difference < 0.25 * max(median.values()), median


def test_a_base_in_another_dot_is_not_there(
    pair: Pair, secret: tuple[DotId, ObjectId, ObjectId]
) -> None:
    data = noise(5000, seed=9)
    new = data[:-4] + b"last"
    frame = compress_with_prefix(new, data)
    for bases in ((BaseSlice(short_key(secret[2])),), (BaseSlice(short_key(secret[2]), 0),)):
        encoding = Encoding.PREFIX if bases[0].page == 0 and len(frame) else Encoding.SIMILAR
        record = encode_record(Record(Kind.CHUNK, encoding, len(new), frame, bases))
        dot, commit = DotId(os.urandom(16)), commit_of()
        chunk = (Kind.CHUNK, object_id(Kind.CHUNK, new), record)
        with pytest.raises(BadObject):
            pushed(pair, dot, commit[1], [chunk, commit])
        assert_untouched(pair, dot)


def test_a_commit_of_another_dot_does_not_count_as_sent(
    pair: Pair, secret: tuple[DotId, ObjectId, ObjectId]
) -> None:
    dot = DotId(os.urandom(16))
    with pytest.raises(ObjectMissing):
        pushed(pair, dot, secret[1], [commit_of()])
    child = commit_of(secret[1])
    with pytest.raises(ObjectMissing):
        pushed(pair, dot, child[1], [child])
    assert_untouched(pair, dot)


def test_the_id_of_a_dot_of_others_opens_nothing(
    pair: Pair, secret: tuple[DotId, ObjectId, ObjectId]
) -> None:
    commit = commit_of()
    with pytest.raises((DotIdClash, DotNotFound)) as refused:
        pushed(pair, secret[0], commit[1], [commit])
    assert "secret" not in refused.value.message and "alice" not in refused.value.message
    assert pair.remote.tip(secret[0]) == secret[1]


# --- records ----------------------------------------------------------------------------------------


def test_records_that_the_plan_does_not_name_are_refused(pair: Pair) -> None:
    dot, commit, extra = DotId(os.urandom(16)), commit_of(), raw(Kind.CHUNK, b"not asked for")

    async def talk(session: Session) -> Any:
        await name_dot(session, "apples", dot)
        await session.send(push_of(dot, commit[1]))
        await session.expect(Ready)
        await session.send(plan_of([commit[:2], (Kind.CHUNK, ObjectId(bytes(32)))]))
        await session.send(Records(commit[2] + extra[2]), Update(TRANSFER, 2))
        return await session.receive()

    with pytest.raises(ProtocolError, match="does not name"):
        as_client(pair, talk)
    assert_untouched(pair, dot)


def test_more_than_the_credits_is_refused_though_nobody_acknowledges(pair: Pair) -> None:
    """An eager transfer has no ACKs: what one window holds is all there may be."""
    dot = DotId(os.urandom(16))
    chunks = [raw(Kind.CHUNK, noise(1 << 20, seed=n)) for n in range(13)]

    async def talk(session: Session) -> Any:
        await name_dot(session, "apples", dot)
        await session.send(push_of(dot, chunks[0][1]))
        await session.expect(Ready)
        await session.send(plan_of([chunk[:2] for chunk in chunks]))
        for chunk in chunks:
            await session.send(Records(chunk[2]))
        await session.send(Update(TRANSFER, len(chunks)))
        return await session.receive()

    assert sum(len(chunk[2]) for chunk in chunks) > INFLIGHT_BYTES_MAX
    with pytest.raises(ProtocolError, match="credits"):
        as_client(pair, talk)


def zstd_header(size: int, window: int | None = None) -> bytes:
    """The start of a frame that states a size, and maybe a window."""
    if window is None:
        return b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", size)
    return (
        b"\x28\xb5\x2f\xfd\xc0" + bytes((window.bit_length() - 11 << 3,)) + struct.pack("<Q", size)
    )


GIBIBYTE_IN_32_KIB = zstandard.ZstdCompressor(level=1).compress(bytes(1 << 30))
BOMBS = {
    "a gibibyte said to be a chunk": (1 << 20, GIBIBYTE_IN_32_KIB),
    "a tebibyte": (1 << 20, zstd_header(1 << 40) + b"\x01\0\0"),
    "a window of 2 GiB": (1000, zstd_header(1000, 1 << 31) + b"\x01\0\0"),
    "no size": (1000, b"\x28\xb5\x2f\xfd\x00\x58\x01\0\0"),
    "many frames": (10, compress(b"0123456789") * 1000),
}


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_are_refused_at_their_header(pair: Pair, name: str) -> None:
    raw_bytes, frame = BOMBS[name]
    record = Record(Kind.CHUNK, Encoding.ZSTD, raw_bytes, frame[: raw_bytes + 64])
    commit, dot = commit_of(), DotId(os.urandom(16))
    chunk = (Kind.CHUNK, ObjectId(bytes(32)), encode_record(record))
    tracemalloc.start()
    began = time.process_time()
    try:
        with pytest.raises(BadObject):
            pushed(pair, dot, commit[1], [chunk, commit])
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
        assert time.process_time() - began < 1
    finally:
        tracemalloc.stop()
    assert_untouched(pair, dot)


def test_values_of_many_small_arrays_are_refused_before_they_fill_memory() -> None:
    count = (9 << 20) // 2
    data = b"\xdd" + struct.pack(">I", count) + b"\x91\x90" * count
    tracemalloc.start()
    with pytest.raises(BadObject):
        decode(data, items_max=524_288)
    assert tracemalloc.get_traced_memory()[1] < 64 << 20
    tracemalloc.stop()


@pytest.mark.parametrize("depth", [200, 1000, 100_000])
def test_arrays_that_promise_more_than_there_is_are_not_made(depth: int) -> None:
    size = 1 << 20
    data = (b"\xdd" + struct.pack(">I", size // 2)) * min(depth, size // 10)
    tracemalloc.start()
    with pytest.raises(BadObject):
        decode(data.ljust(size, b"\0"))
    assert tracemalloc.get_traced_memory()[1] < 8 << 20
    tracemalloc.stop()


LIST_KEY = BaseSlice(bytes(8))
CYCLES: dict[str, list[Record]] = {
    "a base that never comes": [
        Record(Kind.CHUNK, Encoding.PREFIX, 5, compress(b"12345"), (BaseSlice(b"nowhere!"),))
    ],
    "64 pages of nothing": [
        Record(Kind.CHUNK, Encoding.SIMILAR, 5, compress(b"12345"), (LIST_KEY,) * 64)
    ],
    "each on the other": [
        Record(Kind.CHUNK, Encoding.PREFIX, 5, compress(b"12345"), (BaseSlice(b"second.."),)),
        Record(Kind.CHUNK, Encoding.PREFIX, 5, compress(b"67890"), (BaseSlice(b"first..."),)),
    ],
    "a patch of nothing": [
        Record(Kind.CHUNK, Encoding.PATCH, 4096, compress(bytes(4096)), (LIST_KEY,), 1)
    ],
}


@pytest.mark.parametrize("name", CYCLES)
def test_bases_that_are_not_there_are_refused(pair: Pair, name: str) -> None:
    dot, commit = DotId(os.urandom(16)), commit_of()
    made = [(r.kind, ObjectId(os.urandom(32)), encode_record(r)) for r in CYCLES[name]]
    with pytest.raises(BadObject):
        pushed(pair, dot, commit[1], [*made, commit])
    assert_untouched(pair, dot)


def test_a_record_on_itself_or_on_a_later_one_is_refused(pair: Pair) -> None:
    one, two = noise(3000, seed=1), noise(3000, seed=2)
    keys = [short_key(object_id(Kind.CHUNK, data)) for data in (one, two)]
    dot, commit = DotId(os.urandom(16)), commit_of()
    for key in keys:
        frame = compress_with_prefix(one, one if key == keys[0] else two)
        record = Record(Kind.CHUNK, Encoding.PREFIX, len(one), frame, (BaseSlice(key),))
        first = (Kind.CHUNK, object_id(Kind.CHUNK, one), encode_record(record))
        with pytest.raises(BadObject):
            pushed(pair, dot, commit[1], [first, raw(Kind.CHUNK, two), commit])
    assert_untouched(pair, dot)


def test_parents_may_come_after_their_children_and_cycles_cannot_be_made(pair: Pair) -> None:
    first = commit_of()
    second = commit_of(first[1], message="second")
    dot = pair.local.create_dot()
    result = pushed(pair, dot, second[1], [second, first])
    assert isinstance(result, Result) and pair.remote.tip(dot) == second[1]
    assert pair.remote.catalog.graph(dot).generation(second[1]) == 2


def test_a_parent_that_does_not_come_is_missed(pair: Pair) -> None:
    dot, child = DotId(os.urandom(16)), commit_of(ObjectId(os.urandom(32)))
    with pytest.raises(ObjectMissing):
        pushed(pair, dot, child[1], [child])
    assert_untouched(pair, dot)


@pytest.mark.parametrize("count", [0, 2, 2**62])
def test_update_counts_the_records(pair: Pair, count: int) -> None:
    dot, commit = DotId(os.urandom(16)), commit_of()

    async def talk(session: Session) -> Any:
        await name_dot(session, "apples", dot)
        await session.send(push_of(dot, commit[1]))
        await session.expect(Ready)
        await session.send(plan_of([commit[:2]]), Records(commit[2]), Update(TRANSFER, count))
        return await session.receive()

    with pytest.raises(ProtocolError):
        as_client(pair, talk)
    assert_untouched(pair, dot)


def test_an_ack_of_more_than_was_sent_is_refused(pair: Pair) -> None:
    dot = pair.local.create_dot()
    tip = pair.local.commit(dot, {"a": noise(3_000_000)})
    pair.push(dot)

    async def talk(session: Session) -> Any:
        await name_dot(session, "apples", dot)
        await session.send(Fetch(TRANSFER, dot, (tip,), ()))
        plan = await session.expect(Plan)
        nothing = bytes((len(plan.kinds) + 7) // 8)
        await session.send(PlanReply(0, len(plan.kinds), nothing), Ack(10**6, 2**40, 2**40))
        while True:
            await session.receive()

    with pytest.raises(ProtocolError, match="ACK"):
        as_client(pair, talk)


def test_a_captured_push_told_again_moves_nothing(pair: Pair) -> None:
    """Its operation is recorded: the answer must not say that refs moved when none did."""
    dot = pair.local.create_dot()
    first = pair.local.commit(dot, {"a": b"1"})
    pair.push(dot)
    pair.local.commit(dot, {"a": b"2"})
    line = Line(record=True)
    assert pair.try_push(dot, line=lambda: line).error is None
    assert line.up.written is not None
    pair.remote.reset(dot, "master", first)
    captured = bytes(line.up.written)

    async def again() -> None:
        script = Script(captured.removesuffix(bytes_of(Bye())), ends=False)
        await serve(pair.remote, script, Everything())

    with pytest.raises(RefConflict):
        asyncio.run(again())
    assert pair.remote.tip(dot) == first


# --- a server that lies -----------------------------------------------------------------------------------


def bytes_of(message: Message) -> bytes:
    return encode_frame(frame_from_message(message))


class Liar:
    """A server that answers each message of the client by what `answer` gives."""

    def __init__(self, pair: Pair, answer: Callable[[Message], list[Message]]) -> None:
        from dmsync.wire.connection import Connection

        self._connection = Connection(Role.SERVER)
        self._connection.send(hello(pair.remote))
        self._out = self._connection.data_to_send()
        self._answer = answer
        self._arrived = asyncio.Event()
        self._is_closed = False

    async def read(self, n: int) -> bytes:
        while not self._out:
            if self._is_closed:
                return b""
            self._arrived.clear()
            await self._arrived.wait()
        data, self._out = self._out[:n], self._out[n:]
        return data

    async def write(self, data: bytes) -> None:
        try:
            for message in self._connection.receive(data):
                for said in self._answer(message):
                    self._out += bytes_of(said)
                self._is_closed = self._is_closed or not self._connection.is_open
        except DmError:
            self._is_closed = True
        self._arrived.set()

    async def aclose(self) -> None:
        self._is_closed = True


def lied_to(
    pair: Pair, dot: DotId, answer: Callable[[Message], list[Message]], word: str
) -> DmError:
    """The error of a push or fetch with a server that answers so."""

    async def client() -> DmError:
        stream: Any = Liar(pair, answer)
        request: Any
        try:
            async with asyncio.timeout(20):
                if word == "push":
                    request = PushRequest("origin", dot, ("master",), actor="me")
                    await push(pair.local, stream, request)
                else:
                    request = FetchRequest("origin", dot, actor="me", move="ff")
                    await fetch(pair.local, stream, request)
        except DmError as exc:
            return exc
        raise AssertionError("it was believed")

    return asyncio.run(client())


def refs_of(dot: DotId, *refs: RefValue) -> RefsReply:
    return RefsReply(dot, "admin", "apples", "admin", "me", "master", 5, 1, refs)


PUSH_LIES: dict[str, Callable[[DotId, Message], list[Message]]] = {
    "another dot": lambda dot, m: [refs_of(DotId(bytes(16)))] if isinstance(m, Refs) else [],
    "a result before the work": lambda dot, m: [
        *([refs_of(dot), Result(TRANSFER, (), 1, 1)] if isinstance(m, Refs) else [])
    ],
    "ready for another": lambda dot, m: [
        *([refs_of(dot)] if isinstance(m, Refs) else []),
        *([Ready(bytes(16), 5)] if isinstance(m, Push) else []),
    ],
    "a result of nothing": lambda dot, m: [
        *([refs_of(dot)] if isinstance(m, Refs) else []),
        *([Ready(m.transfer, 5), Result(m.transfer, (), 1, 1)] if isinstance(m, Push) else []),
    ],
    "a result of other refs": lambda dot, m: [
        *([refs_of(dot)] if isinstance(m, Refs) else []),
        *(
            [
                Ready(m.transfer, 1 << 20),
                Result(
                    m.transfer,
                    (RefOutcome("branch/other", RefStatus.CREATED, None, m.updates[0].new),),
                    1,
                    1,
                ),
            ]
            if isinstance(m, Push)
            else []
        ),
    ],
    "an ack of what was not sent": lambda dot, m: [
        *([refs_of(dot)] if isinstance(m, Refs) else []),
        *([Ready(m.transfer, 5), Ack(9, 10**9, 5)] if isinstance(m, Push) else []),
    ],
    "a question of its own": lambda dot, m: [
        *([refs_of(dot), KnownQuery(())] if isinstance(m, Refs) else [])
    ],
    "a fetch of its own": lambda dot, m: [
        *([refs_of(dot), Fetch(TRANSFER, dot, (), ())] if isinstance(m, Refs) else [])
    ],
    "records of its own": lambda dot, m: [
        *([refs_of(dot), Records(b"\0\1\1x")] if isinstance(m, Refs) else [])
    ],
    "tracking refs": lambda dot, m: [
        *(
            [refs_of(dot, RefValue("remote/x/master", ObjectId(bytes(32))))]
            if isinstance(m, Refs)
            else []
        )
    ],
}


@pytest.mark.parametrize("name", PUSH_LIES)
def test_a_push_to_a_server_that_lies_is_no_success(pair: Pair, name: str) -> None:
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": b"1"})
    error = lied_to(pair, dot, lambda message: PUSH_LIES[name](dot, message), "push")
    assert isinstance(error, ProtocolError | DotIdClash), error
    assert [row.name for row in pair.local.catalog.refs(dot)] == ["branch/master"]


@pytest.mark.parametrize(
    "reply", [PlanReply(0, 1, b"\0"), PlanReply(65_536, 8, b"\0"), PlanReply(0, 0, b"")]
)
def test_an_inventory_of_another_plan_is_refused(pair: Pair, reply: PlanReply) -> None:
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": noise(3_000_000)})

    def answer(message: Message) -> list[Message]:
        match message:
            case Refs():
                return [refs_of(dot)]
            case Push():
                return [Ready(message.transfer, 1 << 20)]
            case Plan():
                return [reply]
        return []

    assert isinstance(lied_to(pair, dot, answer, "push"), ProtocolError)


def fetch_answers(
    dot: DotId, tip: ObjectId, sent: Callable[[Fetch], list[Message]]
) -> Callable[[Message], list[Message]]:
    def answer(message: Message) -> list[Message]:
        match message:
            case Refs():
                return [refs_of(dot, RefValue("branch/master", tip))]
            case KnownQuery(ids=ids):
                return [KnownReply(bytes(len(ids)))]
            case Fetch():
                return sent(message)
        return []

    return answer


NEW = commit_of(message="new")
EXTRA = raw(Kind.CHUNK, b"extra")
FETCH_LIES: dict[str, Callable[[bytes], list[Message]]] = {
    "a record that was not planned": lambda transfer: [
        plan_of([NEW[:2], (Kind.CHUNK, ObjectId(bytes(32)))]),
        Records(NEW[2] + EXTRA[2]),
        Done(transfer, 2, 2, 0),
    ],
    "nothing": lambda transfer: [plan_of([NEW[:2]]), Done(transfer, 0, 0, 0)],
    "fewer than it says": lambda transfer: [
        plan_of([NEW[:2]]),
        Records(NEW[2]),
        Done(transfer, 2, 2, 0),
    ],
    "for another transfer": lambda transfer: [
        plan_of([NEW[:2]]),
        Records(NEW[2]),
        Done(bytes(16), 1, 1, 0),
    ],
    "no plan": lambda transfer: [Records(NEW[2]), Done(transfer, 1, 1, 0)],
    "an end alone": lambda transfer: [Done(transfer, 0, 0, 0)],
    "something else": lambda transfer: [
        plan_of([EXTRA[:2]]),
        Records(EXTRA[2]),
        Done(transfer, 1, 1, 0),
    ],
    "a result": lambda transfer: [Result(transfer, (), 1, 1)],
    "a record twice": lambda transfer: [
        plan_of([NEW[:2]]),
        Records(NEW[2] * 2),
        Done(transfer, 2, 2, 0),
    ],
}


@pytest.mark.parametrize("name", FETCH_LIES)
def test_a_fetch_from_a_server_that_lies_is_refused(pair: Pair, name: str) -> None:
    dot = pair.local.create_dot()
    tip = pair.local.commit(dot, {"a": b"1"})
    answer = fetch_answers(dot, NEW[1], lambda ask: FETCH_LIES[name](ask.transfer))
    error = lied_to(pair, dot, answer, "fetch")
    assert isinstance(error, ProtocolError | ObjectMissing), error
    assert pair.local.tip(dot) == tip
    assert not pair.local.catalog.graph(dot).has(NEW[1])


# --- cost -----------------------------------------------------------------------------------------------


def ids(count: int) -> tuple[ObjectId, ...]:
    return tuple(ObjectId(n.to_bytes(32, "big")) for n in range(count))


def refs(count: int) -> tuple[RefValue, ...]:
    return tuple(RefValue(f"branch/z{n}", ObjectId(bytes(32))) for n in range(count))


GROWING: dict[str, Callable[[int], Message]] = {
    "KNOWN": lambda n: KnownQuery(ids(n)),
    "KNOWN_REPLY": lambda n: KnownReply(bytes(n)),
    "REFS_REPLY": lambda n: refs_of(DotId(bytes(16)), *refs(n // 2)),
    "PLAN": lambda n: Plan(0, bytes(n * 16), bytes(8 * n * 16), n * 16, 1),
    "PUSH": lambda n: Push(
        TRANSFER, TRANSFER, DotId(bytes(16)), None, "a", True, True, (), ids(n * 4)
    ),
    "FETCH": lambda n: Fetch(TRANSFER, DotId(bytes(16)), ids(n), ids(n * 4)),
    "RESULT": lambda n: Result(
        TRANSFER,
        tuple(RefOutcome(f"branch/z{k}", RefStatus.LEFT, None, None) for k in range(n // 2)),
        1,
        1,
    ),
}
FIRST_SIZE = 128
DOUBLINGS = 5


def least_cpu_s(work: Callable[[], object]) -> float:
    best = 1e9
    for _ in range(5):
        began = time.process_time()
        work()
        best = min(best, time.process_time() - began)
    return best


def growth(work: Callable[[int], Callable[[], object]]) -> float:
    """By what a doubling multiplies the time, on the average of five."""
    first = work(FIRST_SIZE)
    last = work(FIRST_SIZE << DOUBLINGS)
    return float((least_cpu_s(last) / max(least_cpu_s(first), 2e-5)) ** (1 / DOUBLINGS))


@pytest.mark.parametrize("name", GROWING)
def test_a_message_costs_as_much_as_it_is_long(name: str) -> None:
    from dmsync.wire.frames import FrameBuffer
    from dmsync.wire.messages import message_from_frame

    def work(size: int) -> Callable[[], object]:
        data = bytes_of(GROWING[name](size))

        def parse() -> None:
            buffer = FrameBuffer()
            buffer.handshaken = True
            for start in range(0, len(data), 1000):  # as it comes
                buffer.feed(data[start : start + 1000])
                for frame in buffer.frames():
                    message_from_frame(frame)

        return parse

    assert growth(work) < 2.3


def test_a_plan_costs_as_much_as_it_is_long() -> None:
    def work(size: int) -> Callable[[], object]:
        keys = os.urandom(8 * size * 16)

        def plan() -> None:
            planned = PlannedKeys()
            for start in range(0, len(keys), 8 * 512):
                planned.add(keys[start : start + 8 * 512])
            assert all(keys[at : at + 8] in planned for at in range(0, len(keys), 8 * 4))
            assert os.urandom(8) not in planned

        return plan

    assert growth(work) < 2.3


def test_a_proof_ends_when_its_client_leaves(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """However much there were to prove."""
    dot, commit = DotId(os.urandom(16)), commit_of()
    steps = 0

    def endless(*_: Any) -> Any:
        nonlocal steps
        while True:
            steps += 1
            time.sleep(0.001)
            yield

    monkeypatch.setattr("dmsync.engine.sync_server.prove_closure", endless)

    async def talk(session: Session) -> None:
        await name_dot(session, "apples", dot)
        await session.send(push_of(dot, commit[1]))
        await session.expect(Ready)
        await session.send(plan_of([commit[:2]]), Records(commit[2]), Update(TRANSFER, 1))
        while steps < 5:
            await asyncio.sleep(0.01)
        raise NetworkError("gone")

    with pytest.raises(NetworkError):
        as_client(pair, talk)
    seen = steps
    time.sleep(0.05)
    assert steps == seen


async def planned(stream: Any) -> Plan:
    """Read a server's answers up to its plan."""
    from dmsync.wire.frames import FrameBuffer
    from dmsync.wire.messages import message_from_frame

    buffer, start = FrameBuffer(), len(MAGIC)
    buffer.handshaken = True
    while True:
        data = await stream.read(1 << 20)
        buffer.feed(data[start:])
        start = 0
        for frame in buffer.frames():
            message = message_from_frame(frame)
            if isinstance(message, Plan):
                return message


def test_a_client_that_stops_reading_is_given_up_and_holds_nothing(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What waits for it is a window, whatever it asked for."""
    monkeypatch.setattr("dmsync.engine.session.NO_PROGRESS_TIMEOUT_S", 0.5)
    dot = pair.local.create_dot()
    tip = pair.local.commit(dot, {"a": noise(20_000_000)})
    pair.push(dot)
    window = 200_000

    async def session() -> tuple[int, DmError]:
        line = Line(window_bytes=window)
        server = asyncio.create_task(serve(pair.remote, line.server, pair.access))
        asking = [hello(pair.local), Refs(dot, None, None, Intent.PULL)]
        await line.client.write(b"".join(map(bytes_of, asking)))
        await line.client.write(bytes_of(Fetch(TRANSFER, dot, (tip,), ())))
        plan = await planned(line.client)
        nothing = bytes((len(plan.kinds) + 7) // 8)
        await line.client.write(bytes_of(PlanReply(0, len(plan.kinds), nothing)))
        with pytest.raises(NetworkError) as given_up:
            async with asyncio.timeout(20):
                await server
        return line.down.bytes_written, given_up.value

    written, error = asyncio.run(session())
    assert "took nothing" in error.message or "sent nothing" in error.message
    assert written < window + 4 * 512 * 1024
    assert pair.push(dot).nothing_to_do
