"""Two stores and what tests of synchronising do with them."""

import asyncio
import os
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from dmsync.core.chunking import FIXED_CHUNK_BYTES, FileHasher
from dmsync.core.events import CommitsAdded, DotCreated, Event, RefChanged, RemoteAdded
from dmsync.core.ids import DotId, Kind, ObjectId
from dmsync.core.objects import ROOT_ENTRY, Commit, Entry, EntryKind, Layout, commit_from_bytes
from dmsync.core.pages import Span, file_spans, walk_tree, write_directory, write_manifest
from dmsync.engine.ports import TargetTree
from dmsync.engine.sync_pull import (
    CloneRequest,
    FetchRequest,
    FetchSummary,
    clone,
    fetch,
)
from dmsync.engine.sync_push import PushRequest, PushSummary, push
from dmsync.engine.sync_server import serve
from dmsync.errors import DmError
from dmsync.storage.catalog import Catalog
from dmsync.storage.layout import Layout as StoreLayout
from dmsync.storage.layout import create_store
from dmsync.storage.object_store import ObjectStore
from tests.support.streams import Line

Files = dict[str, bytes]


class FakeStore:
    """A store as synchronising sees it, without the engine's Store."""

    def __init__(self, home: str) -> None:
        self.home = home
        if not os.path.exists(os.path.join(home, "format")):
            create_store(
                home,
                cluster_id=os.urandom(16),
                epoch=1,
                op_id=os.urandom(16),
                time_ns=1,
                actor="test",
            )
        self.layout = StoreLayout(home)
        self._objects: dict[DotId, ObjectStore] = {}
        self.catalog = Catalog.open(
            home,
            lambda dot, c: self.objects(dot).read_commit(c),
            read_tag=lambda dot, tag: self.objects(dot).read(Kind.TAG, tag),
        )

    def objects(self, dot: DotId) -> ObjectStore:
        if dot not in self._objects:
            self._objects[dot] = ObjectStore(self.layout.dot_dir(dot))
            self._objects[dot].is_partial = lambda: self.catalog.scope(dot) is not None
        return self._objects[dot]

    def close(self) -> None:
        for objects in self._objects.values():
            objects.close()
        self.catalog.close()

    # --- making things ------------------------------------------------------------------------

    def append(self, *events: Event) -> None:
        with self.catalog.transaction("test", "tester") as tx:
            for event in events:
                tx.append(event)

    def create_dot(self, name: str = "apples", namespace: str = "admin") -> DotId:
        dot = DotId(os.urandom(16))
        self.append(DotCreated(dot, namespace, name, "tester"))
        return dot

    def add_remote(self, name: str = "origin") -> None:
        self.append(RemoteAdded(name, "ssh://host"))

    def tip(self, dot: DotId, branch: str = "master") -> ObjectId | None:
        return self.ref(dot, f"branch/{branch}")

    def ref(self, dot: DotId, name: str) -> ObjectId | None:
        row = self.catalog.ref(dot, name)
        return None if row is None else row.target

    def branch_names(self, dot: DotId) -> list[str]:
        return [row.short_name for row in self.catalog.branches(dot)]

    def commit(
        self,
        dot: DotId,
        files: Files,
        branch: str = "master",
        *,
        parents: tuple[ObjectId, ...] | None = None,
        message: str = "",
        origin: str | None = None,
    ) -> ObjectId:
        """A commit of `files` on `branch`, whose tip is the first parent unless given."""
        old = self.tip(dot, branch)
        if parents is None:
            parents = (old,) if old else ()
        objects = self.objects(dot)
        base = self._root(dot, parents[0]) if parents else ROOT_ENTRY
        with objects.writer() as writer:
            root = write_tree(objects, writer, files, base)
            commit = Commit(root, parents, "a", "a", 1_700_000_000_000_000_000, 0, message)
            commit_id = writer.put(Kind.COMMIT, commit.to_bytes())
            writer.seal()
        kind = "create" if old is None else "commit"
        self.append(
            CommitsAdded(dot, (commit_id,), None, None),
            RefChanged(dot, f"branch/{branch}", old, commit_id, kind, "", origin),
        )
        return commit_id

    def branch(self, dot: DotId, name: str, at: ObjectId, origin: str = "master") -> None:
        self.append(RefChanged(dot, f"branch/{name}", None, at, "create", "", origin))

    def reset(self, dot: DotId, branch: str, to: ObjectId) -> None:
        self.append(RefChanged(dot, f"branch/{branch}", self.tip(dot, branch), to, "reset"))

    # --- reading --------------------------------------------------------------------------------

    def _root(self, dot: DotId, commit: ObjectId) -> Entry:
        return commit_from_bytes(self.objects(dot).read_commit(commit)).root

    def files(self, dot: DotId, commit: ObjectId | None) -> Files:
        """Every file of a commit, read in full."""
        assert commit is not None
        objects = self.objects(dot)
        found = {}
        for path, entry in walk_tree(objects, self._root(dot, commit)):
            if entry.kind is EntryKind.FILE:
                spans = file_spans(objects, entry)
                found[path.decode()] = b"".join(objects.read_chunk(s.chunk) for s in spans)
        return found

    def log(self, dot: DotId, branch: str = "master") -> list[ObjectId]:
        graph = self.catalog.graph(dot)
        commit, found = self.tip(dot, branch), []
        while commit is not None:
            found.append(commit)
            parents = graph.parents(commit)
            commit = parents[0] if parents else None
        return found


def write_tree(objects: ObjectStore, writer: Any, files: Files, base: Entry) -> Entry:
    """Write `files` (paths with at most one directory) as a tree; large ones as FIXED manifests."""
    old = {
        path.decode(): entry
        for path, entry in (walk_tree(objects, base) if base.tree else ())
        if entry.kind is EntryKind.FILE
    }
    directories: dict[str, list[Entry]] = {"": []}
    for path, data in files.items():
        directory, _, name = path.rpartition("/")
        entry = write_file(objects, writer, name.encode(), data, old.get(path))
        directories.setdefault(directory, []).append(entry)
    for directory in sorted(directories):
        if directory:
            entries = sorted(directories[directory], key=lambda e: e.name)
            tree = write_directory(writer, entries)
            directories[""].append(Entry(directory.encode(), EntryKind.DIRECTORY, 0o755, tree=tree))
    top = sorted(directories[""], key=lambda e: e.name)
    return Entry(b"", EntryKind.DIRECTORY, 0o755, tree=write_directory(writer, top))


def write_file(
    objects: ObjectStore, writer: Any, name: bytes, data: bytes, old: Entry | None
) -> Entry:
    if not data:
        return Entry(name, EntryKind.FILE, 0o644)
    old_chunks = [s.chunk for s in file_spans(objects, old)] if old and old.size else []
    spans = []
    for number, start in enumerate(range(0, len(data), FIXED_CHUNK_BYTES)):
        part = data[start : start + FIXED_CHUNK_BYTES]
        base = old_chunks[number] if number < len(old_chunks) else None
        spans.append(Span(len(part), writer.put(Kind.CHUNK, part, base=base)))
    if len(spans) == 1:
        return Entry(
            name,
            EntryKind.FILE,
            0o644,
            size=len(data),
            content=spans[0].chunk,
            layout=Layout.SINGLE,
        )
    tree = write_manifest(writer, spans, Layout.FIXED)
    hasher = FileHasher()
    hasher.update(data)
    return Entry(
        name,
        EntryKind.FILE,
        0o644,
        size=len(data),
        content=hasher.content(),
        layout=Layout.FIXED,
        tree=tree,
    )


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


@dataclass
class Everything:
    """Access for a trusted peer; `allowed` narrows it."""

    user: str = "admin"
    default_namespace: str = "admin"
    allowed: Callable[[str, str, str], bool] = field(default=lambda namespace, name, verb: True)
    actor: str = "admin"
    login: str = ""
    address: str = ""

    def may(self, namespace: str, name: str, verb: str) -> bool:
        return self.allowed(namespace, name, verb)


@dataclass
class Outcome:
    """What a session gave: the client's result or error, the server's error, the line."""

    result: Any
    error: DmError | None
    server_error: DmError | None
    line: Line


class Pair:
    """A local and a remote store, and sessions between them."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.local = FakeStore(os.path.join(directory, "local"))
        self.remote = FakeStore(os.path.join(directory, "remote"))
        if self.local.catalog.remote("origin") is None:
            self.local.add_remote()
        self.access = Everything()
        self.server_tree = TargetTree()
        self.local_tree = TargetTree()

    def close(self) -> None:
        self.local.close()
        self.remote.close()

    def reopen(self) -> None:
        """As after a kill of both processes."""
        self.close()
        self.local = FakeStore(self.local.home)
        self.remote = FakeStore(self.remote.home)

    def run(
        self, client: Callable[[Any], Awaitable[Any]], line: Callable[[], Line] | None = None
    ) -> Outcome:
        return asyncio.run(self._run(client, line or Line))

    async def _run(
        self, client: Callable[[Any], Awaitable[Any]], make_line: Callable[[], Line]
    ) -> Outcome:
        line = make_line()
        server_error: list[DmError] = []

        async def server() -> None:
            try:
                await serve(self.remote, line.server, self.access, self.server_tree)
            except DmError as exc:
                server_error.append(exc)

        task = asyncio.create_task(server())
        result, error = None, None
        try:
            async with asyncio.timeout(60):
                result = await client(line.client)
        except DmError as exc:
            error = exc
        async with asyncio.timeout(60):
            await task
        return Outcome(result, error, server_error[0] if server_error else None, line)

    def push(self, dot: DotId, *branches: str, **more: Any) -> PushSummary:
        outcome = self.try_push(dot, *branches, **more)
        if outcome.error:
            raise outcome.error
        assert outcome.server_error is None
        result: PushSummary = outcome.result
        return result

    def try_push(self, dot: DotId, *branches: str, line: Any = None, **more: Any) -> Outcome:
        more.setdefault("remote_name", "apples")
        names = None if more.pop("every", False) else branches or ("master",)
        request = PushRequest("origin", dot, names, actor="me", **more)
        return self.run(lambda stream: push(self.local, stream, request), line)

    def fetch(self, dot: DotId, **more: Any) -> FetchSummary:
        outcome = self.try_fetch(dot, **more)
        if outcome.error:
            raise outcome.error
        assert outcome.server_error is None
        result: FetchSummary = outcome.result
        return result

    def try_fetch(self, dot: DotId, line: Any = None, **more: Any) -> Outcome:
        request = FetchRequest("origin", dot, actor="me", **more)
        return self.run(lambda stream: fetch(self.local, stream, request, self.local_tree), line)

    def try_pull(self, dot: DotId, **more: Any) -> Outcome:
        more.setdefault("move", "ff")
        return self.try_fetch(dot, **more)

    def pull(self, dot: DotId, **more: Any) -> FetchSummary:
        more.setdefault("move", "ff")
        return self.fetch(dot, **more)

    def clone(self, name: str = "apples", **more: Any) -> FetchSummary:
        outcome = self.try_clone(name, **more)
        if outcome.error:
            raise outcome.error
        result: FetchSummary = outcome.result
        return result

    def try_clone(self, name: str = "apples", line: Any = None, **more: Any) -> Outcome:
        request = CloneRequest("origin", name, "admin", actor="me", **more)
        return self.run(lambda stream: clone(self.local, stream, request, self.local_tree), line)
