"""A push and a pull recorded once, and given again, changed, to the side that took them.

Four recordings: what the client of a push said, to a server; what the server of a push said, to a
client; and both of a pull. The stores are small and real; the streams are in memory, above SSH.
"""

import asyncio
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

from dmsync.core.ids import DotId, ObjectId
from dmsync.engine import session as session_module
from dmsync.engine.sync_pull import FetchRequest, fetch
from dmsync.engine.sync_push import PushRequest, push
from dmsync.engine.sync_server import serve
from dmsync.errors import DmError
from dmsync.wire.frames import HEADER
from dmsync.wire.limits import MAGIC
from tests.support.streams import Line
from tests.support.sync_stores import Everything, FakeStore, Files, Pair

DIRECTIONS: Final = ("push to a server", "push to a client", "pull to a server", "pull to a client")
_TRANSFER: Final = bytes(range(16))
_HANG_S: Final = 20.0


@dataclass(frozen=True)
class Recording:
    """What one side heard, `home` being its store before it, and what it held afterwards."""

    direction: str
    home: str
    dot: DotId
    said: bytes
    marks: tuple[tuple[int, int], ...]
    """(where something said begins, how much the other side had said before)."""
    old: dict[str, ObjectId]
    new: dict[str, ObjectId]
    contents: dict[ObjectId, Files]

    def frame_starts(self) -> list[int]:
        """Where each frame begins, and the end."""
        at = len(MAGIC) if self.said.startswith(MAGIC) else 0
        starts = []
        while at < len(self.said):
            starts.append(at)
            at += HEADER.size + HEADER.unpack_from(self.said, at)[0]
        return [*starts, at]


def _same_id(size: int) -> bytes:
    return _TRANSFER[:size]


@contextmanager
def hurried() -> Iterator[None]:
    """Deadlines of a moment: for tries that may end in any refusal, not for those that succeed."""
    times: dict[str, Any] = {
        "HANDSHAKE_TIMEOUT_S": 0.2,
        "IDLE_TIMEOUT_S": 0.2,
        "NO_PROGRESS_TIMEOUT_S": 0.2,
        "DRAIN_S": 0.02,
        "WATCH_S": 0.05,
    }
    with mock.patch.multiple(session_module, **times):
        yield


@contextmanager
def named_alike() -> Iterator[None]:
    """All transfers get one id, so that a recorded answer answers."""
    with mock.patch("dmsync.engine.transfers.os", SimpleNamespace(urandom=_same_id)):
        yield


def contents(seed: int) -> tuple[Files, Files]:
    """Two states of a tree whose second is stored with deltas, pages and chunks of each form."""
    rng = random.Random(f"recorded:{seed}")
    page = rng.randbytes(1500)
    old = {"a": b"first", "d/page": page * 3, "d/same": b"unchanged"}
    new = {
        **old,
        "a": b"second " * 40,
        "d/page": page + b"changed" + page * 2,
        "d/new": rng.randbytes(90),
    }
    return old, new


def _refs(store: FakeStore, dot: DotId) -> dict[str, ObjectId]:
    if store.catalog.dot(dot) is None:
        return {}
    return {row.name: row.target for row in store.catalog.refs(dot)}


def record(directory: str, direction: str, seed: int) -> Recording:
    """Do the transfer once and keep what was said and where it began."""
    shutil.rmtree(directory, ignore_errors=True)
    pair = Pair(os.path.join(directory, "recorded"))
    is_push = direction.startswith("push")
    sender, receiver = (pair.local, pair.remote) if is_push else (pair.remote, pair.local)
    dot = sender.create_dot()
    old_files, new_files = contents(seed)
    first = sender.commit(dot, old_files)
    if is_push:
        pair.push(dot)
    else:
        pair.clone()
    second = sender.commit(dot, new_files)
    home = os.path.join(directory, "before")
    side = pair.remote if direction.endswith("server") else pair.local
    old = _refs(side, dot)
    pair.close()
    shutil.copytree(side.home, home)
    pair.reopen()
    marks: list[tuple[int, int]] = []

    def note(at: int, data: bytes) -> bytes:
        other = line.up if direction.endswith("client") else line.down
        marks.append((at, other.bytes_written))
        return data

    if direction.endswith("client"):
        line = Line(record=True, change_down=note)
    else:
        line = Line(record=True, change_up=note)
    with named_alike():
        outcome = (
            pair.try_push(dot, line=lambda: line)
            if is_push
            else pair.try_fetch(dot, move="ff", line=lambda: line)
        )
    assert outcome.error is None and outcome.server_error is None, outcome
    heard = line.up if direction.endswith("server") else line.down
    side = pair.remote if direction.endswith("server") else pair.local
    new = _refs(side, dot)
    assert receiver.home and heard.written is not None
    pair.close()
    known = {first: old_files, second: new_files}
    said = bytes(heard.written)
    return Recording(direction, home, dot, said, tuple(marks), old, new, known)


class Paced:
    """A peer that says what it said, each piece when it has heard what it waited for; then it
    ends."""

    def __init__(self, said: bytes, marks: tuple[tuple[int, int], ...]) -> None:
        self._said = said
        self._marks = marks
        self._at = self._heard = 0
        self._asked = asyncio.Event()

    def _allowed(self) -> int:
        """Up to where it may speak now."""
        later = (at for at, needed in self._marks if needed > self._heard)
        return min(next(later, len(self._said)), len(self._said))

    async def read(self, n: int) -> bytes:
        while self._at >= self._allowed() < len(self._said):
            self._asked.clear()
            await self._asked.wait()
        data = self._said[self._at : min(self._allowed(), self._at + n)]
        self._at += len(data)
        return data

    async def write(self, data: bytes) -> None:
        self._heard += len(data)
        self._asked.set()
        await asyncio.sleep(0)

    async def aclose(self) -> None:
        return None


class Replay:
    """One side's store, told a recording again and again; put back when it took something."""

    def __init__(self, recording: Recording, directory: str) -> None:
        self._recording = recording
        self._home = os.path.join(directory, "replayed")
        self._store: FakeStore | None = None
        self._put_back()

    def _put_back(self) -> None:
        self.close()
        shutil.rmtree(self._home, ignore_errors=True)
        shutil.copytree(self._recording.home, self._home)
        self._store = FakeStore(self._home)

    def close(self) -> None:
        """Close the store."""
        if self._store is not None:
            self._store.close()
            self._store = None

    def tell(self, said: bytes, *, keep_quarantine: bool = False) -> tuple[str, str]:
        """(what became of it, why): `refused`, `same` as recorded, `nothing` at all, `other` sound
        refs, or `LOST`."""
        assert self._store is not None
        try:
            with self._naming():
                error = asyncio.run(self._tell(Paced(said, self._recording.marks)))
        except Exception as exc:
            self._put_back()
            return "LOST", f"{type(exc).__name__}: {exc}"
        refs = _refs(self._store, self._recording.dot)
        verdict = self._verdict(error, refs)
        if refs != self._recording.old or verdict[0] == "LOST":
            self._put_back()
        elif not keep_quarantine:
            self._empty_quarantine()
        return verdict

    def _naming(self) -> AbstractContextManager[None]:
        """A client gives transfers their id, which the recorded answers repeat."""
        is_server = self._recording.direction.endswith("server")
        return nullcontext() if is_server else named_alike()

    def tell_cleanly(self) -> tuple[str, str]:
        """As `tell` of the unchanged session, with what broken ones left in quarantine. A client's
        store is a new one, which has not used the id of the recorded transfer."""
        if self._recording.direction.endswith("server"):
            return self.tell(self._recording.said, keep_quarantine=True)
        left = os.path.join(os.path.dirname(self._home), "left")
        shutil.rmtree(left, ignore_errors=True)
        if os.path.isdir(self._quarantine):
            shutil.copytree(self._quarantine, left)
        self._put_back()
        if os.path.isdir(left):
            shutil.rmtree(self._quarantine, ignore_errors=True)
            shutil.copytree(left, self._quarantine)
        return self.tell(self._recording.said, keep_quarantine=True)

    @property
    def _quarantine(self) -> str:
        assert self._store is not None
        return os.path.join(self._store.layout.dot_dir(self._recording.dot), "quarantine")

    def _verdict(self, error: DmError | None, refs: dict[str, ObjectId]) -> tuple[str, str]:
        recording, store = self._recording, self._store
        assert store is not None
        known = recording.contents
        for name, commit in refs.items():
            try:
                if commit not in known or store.files(recording.dot, commit) != known[commit]:
                    return "LOST", f"{name} names what was never said"
            except DmError as exc:
                return "LOST", f"{name} names what is not here: {exc.message}"
        if error is not None:
            return ("refused", error.code) if refs == recording.old else ("same", error.code)
        if refs == recording.new:
            return "same", ""
        return ("nothing", "") if refs == recording.old else ("other", str(sorted(refs)))

    async def _tell(self, script: Paced) -> DmError | None:
        store, recording = self._store, self._recording
        assert store is not None
        work: Any
        if recording.direction.endswith("server"):
            work = serve(store, script, Everything())
        elif recording.direction.startswith("push"):
            request = PushRequest(
                "origin", recording.dot, ("master",), actor="me", remote_name="apples"
            )
            work = push(store, script, request)
        else:
            work = fetch(
                store, script, FetchRequest("origin", recording.dot, actor="me", move="ff")
            )
        try:
            async with asyncio.timeout(_HANG_S):
                await work
        except DmError as exc:
            return exc
        return None

    def _empty_quarantine(self) -> None:
        if os.path.isdir(self._quarantine):
            for name in os.listdir(self._quarantine):
                os.unlink(os.path.join(self._quarantine, name))
