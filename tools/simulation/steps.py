"""What can happen in a run: commands at the clients and the server, each in its own process."""

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, Final

from dmsync.core.retention import RetentionPolicy
from dmsync.engine import branches, tagging
from dmsync.engine.collecting.collection import CollectionRequest
from dmsync.engine.collecting.collection import collect as collect_garbage
from dmsync.engine.collecting.roots import GRACE_NS_DEFAULT
from dmsync.engine.merging.lifecycle import MergeOptions, merge_revision
from dmsync.engine.prune import PruneRequest, prune
from dmsync.engine.settings import Holding
from dmsync.engine.store import Store
from dmsync.engine.sync_pull import CloneRequest, FetchRequest, FetchSummary, clone, fetch
from dmsync.engine.sync_push import PushMode, PushRequest, PushSummary, push
from dmsync.engine.target_tree import TARGET_TREE
from dmsync.engine.undoing.lifecycle import UndoRequest, undo
from dmsync.errors import (
    AlreadyExists,
    CannotUndo,
    ContentAbsent,
    Diverged,
    DmError,
    DotNotFound,
    MergeConflict,
    NotFastForward,
    NotFound,
    NothingToDo,
    RefConflict,
    RevisionNotFound,
    UnrelatedHistories,
    UsageError,
    WouldLose,
)
from dmsync.wire.messages import RefStatus
from tools.simulation.history import Invocation, Promise
from tools.simulation.machines import Machine, connect
from tools.simulation.network import End, Weather
from tools.simulation.scene import DOT_NAME, commit_files
from tools.simulation.scheduler import PowerCut

if TYPE_CHECKING:
    from tools.simulation.world import World

REFUSALS: Final = (
    AlreadyExists,
    CannotUndo,
    ContentAbsent,
    Diverged,
    DotNotFound,
    MergeConflict,
    NotFastForward,
    NotFound,
    NothingToDo,
    RefConflict,
    RevisionNotFound,
    UnrelatedHistories,
    UsageError,
    WouldLose,
)
"""Answers: nothing changed, and asking again would give the same."""
BRANCHES: Final = ("master", "master", "master", "left", "right")
MODES: Final[tuple[PushMode, ...]] = ("ff", "ff", "ff", "lease", "stash")
Change = Callable[[Store, Invocation], Awaitable[None]]


@dataclass(frozen=True)
class Work:
    """A command. `holding`: how it opens its store."""

    change: Change
    holding: Holding = "wait"


async def run_step(world: "World", machine: Machine, verb: str, work: Work) -> Invocation:
    """One command in a process of its own; what became of it goes into the history."""
    await machine.up()
    invocation = world.invoke(machine, verb)
    process = machine.process(verb)
    task = world.scheduler.start(process, _in_process(machine, work, invocation))
    try:
        await task
        invocation.result = "ok"
    except REFUSALS as exc:
        invocation.result, invocation.error = "failed", exc.code
    except DmError as exc:
        invocation.result, invocation.error = "unknown", f"{exc.code}: {exc.message}"
        world.note_error(invocation, exc)
    except (PowerCut, asyncio.CancelledError):
        if not process.is_dead:
            raise
        invocation.result, invocation.error = "unknown", "its machine went down"
        invocation.promises.clear()
    finally:
        machine.ended(process)
    world.concluded(invocation)
    return invocation


async def _in_process(machine: Machine, work: Work, invocation: Invocation) -> None:
    store = await asyncio.to_thread(machine.open, work.holding)
    try:
        await work.change(store, invocation)
    finally:
        await asyncio.to_thread(store.close)


# --- one store ----------------------------------------------------------------------------------


def locally(change: Callable[[Store, Invocation], None], holding: Holding = "wait") -> Work:
    """A command without a remote: all of it in one thread."""

    async def work(store: Store, invocation: Invocation) -> None:
        await asyncio.to_thread(partial(change, store, invocation))

    return Work(work, holding)


def commit(world: "World", random: Random) -> Work:
    branch = random.choice(BRANCHES)

    def change(store: Store, invocation: Invocation) -> None:
        op_id = os.urandom(16)
        invocation.facts |= {"branch": branch, "op": op_id}
        world.row(store)
        old, new = commit_files(store, world.dot, branch, random, op_id)
        invocation.promises.append(Promise(invocation.machine, f"branch/{branch}", old, new, op_id))

    return locally(change)


def make_branch(world: "World", random: Random) -> Work:
    name = random.choice(("left", "right", f"topic{random.randrange(3)}"))

    def change(store: Store, invocation: Invocation) -> None:
        invocation.facts["branch"] = name
        tip = branches.create_branch(store, world.row(store), name, None)
        invocation.promises.append(Promise(invocation.machine, f"branch/{name}", None, tip))

    return locally(change)


def delete_branch(world: "World", random: Random) -> Work:
    name = random.choice(("left", "right", "topic0", "topic1"))

    def change(store: Store, invocation: Invocation) -> None:
        invocation.facts["branch"] = name
        tip, _ = branches.delete_branch(store, world.row(store), name)
        invocation.promises.append(Promise(invocation.machine, f"branch/{name}", tip, None))

    return locally(change)


def make_tag(world: "World", random: Random) -> Work:
    name = f"v{random.randrange(4)}"
    message = random.choice((None, "a tag"))
    force = random.random() < 0.3

    def change(store: Store, invocation: Invocation) -> None:
        invocation.facts["tag"] = name
        request = tagging.TagRequest(name, "HEAD", message=message, force=force)
        made = tagging.create_tag(store, world.row(store), request)
        if made.target != made.old:
            invocation.promises.append(
                Promise(invocation.machine, f"tag/{name}", made.old, made.target)
            )

    return locally(change)


def reset(world: "World", random: Random) -> Work:
    def change(store: Store, invocation: Invocation) -> None:
        branches.reset(store, world.row(store), "HEAD~1", hard=True)

    return locally(change)


def take_back(world: "World", random: Random) -> Work:
    def change(store: Store, invocation: Invocation) -> None:
        for _ in undo(store, 1, UndoRequest()):
            pass

    return locally(change)


def thin(world: "World", random: Random) -> Work:
    def change(store: Store, invocation: Invocation) -> None:
        prune(store, world.row(store), PruneRequest(RetentionPolicy(last=2)))

    return locally(change)


# --- with the server ----------------------------------------------------------------------------


def push_branches(world: "World", random: Random, *, calm: bool = False) -> Work:
    mode: PushMode = random.choice(MODES)
    names = random.choice((("master",), ("master",), None, (random.choice(BRANCHES),)))
    request = PushRequest(
        "origin",
        world.dot,
        names,
        remote_name=DOT_NAME,
        mode=mode,
        tags=random.random() < 0.2,
        atomic=random.random() < 0.3,
        actor="me",
    )
    weather = world.weather(random, calm=calm)

    async def work(store: Store, invocation: Invocation) -> None:
        invocation.facts |= {"mode": mode, "branches": names or "all", "tags": request.tags}
        invocation.facts |= {"atomic": request.atomic, "weather": weather.fault}
        stream = _connected(world, invocation, weather, random)
        _promise_push(invocation, await push(store, stream, request))

    return Work(work)


def _promise_push(invocation: Invocation, summary: PushSummary) -> None:
    for ref in summary.refs:
        if ref.status in _MOVED and summary.transfer_id is not None:
            invocation.promises.append(
                Promise("server", ref.ref, ref.old, ref.new, summary.transfer_id)
            )
            if ref.stash is not None:
                invocation.promises.append(
                    Promise("server", ref.stash, None, ref.old, summary.transfer_id)
                )


def _connected(world: "World", invocation: Invocation, weather: Weather, random: Random) -> End:
    client = world.machines[invocation.machine]
    return connect(client, world.server, weather, random, f"step{invocation.number}")


def fetch_branches(world: "World", random: Random, *, calm: bool = False) -> Work:
    return _fetch(world, random, "none", calm=calm)


def pull_branches(world: "World", random: Random, *, calm: bool = False) -> Work:
    return _fetch(world, random, random.choice(("ff", "stash", "ff", "force")), calm=calm)


def _fetch(world: "World", random: Random, move: Any, *, calm: bool) -> Work:
    weather = world.weather(random, calm=calm)
    names = random.choice((None, ("master",)))

    async def work(store: Store, invocation: Invocation) -> None:
        invocation.facts |= {"move": move, "branches": names or "all", "weather": weather.fault}
        request = FetchRequest(
            "origin", world.dot, remote_name=DOT_NAME, branches=names, move=move, actor="me"
        )
        stream = _connected(world, invocation, weather, random)
        summary = await fetch(store, stream, request, TARGET_TREE)
        _promise_fetch(invocation, summary)

    return Work(work)


def _promise_fetch(invocation: Invocation, summary: FetchSummary) -> None:
    for ref in summary.refs:
        if ref.status in _MOVED:
            invocation.promises.append(Promise(invocation.machine, ref.ref, ref.old, ref.new))
    for name, old, new in summary.tracking:
        invocation.promises.append(Promise(invocation.machine, name, old, new))


def pull_and_merge(world: "World", random: Random, *, calm: bool = False) -> Work:
    """Fetch, then merge what came into the current branch; conflicts are decided for ours."""
    fetching = _fetch(world, random, "none", calm=calm)

    async def work(store: Store, invocation: Invocation) -> None:
        await fetching.change(store, invocation)
        options = MergeOptions("remote/origin/master", favour="ours", message="merge")
        summary = await asyncio.to_thread(partial(merge_revision, store, world.row(store), options))
        if summary.commit is not None and summary.commit != summary.ours:
            invocation.promises.append(
                Promise(
                    invocation.machine, f"branch/{summary.branch}", summary.ours, summary.commit
                )
            )

    return Work(work)


def clone_dot(world: "World", random: Random, *, calm: bool = False) -> Work:
    """Clone what is there already: it pulls; on a fresh machine it makes the dot."""
    weather = world.weather(random, calm=calm)

    async def work(store: Store, invocation: Invocation) -> None:
        invocation.facts["weather"] = weather.fault
        stream = _connected(world, invocation, weather, random)
        request = CloneRequest("origin", DOT_NAME, "admin", actor="me")
        summary = await clone(store, stream, request, TARGET_TREE)
        _promise_fetch(invocation, summary)

    return Work(work)


def collect(world: "World", random: Random) -> Work:
    """gc with a random grace."""
    grace_ns = random.choice((0, 0, 3_600 * 10**9, GRACE_NS_DEFAULT))

    def change(store: Store, invocation: Invocation) -> None:
        invocation.facts["grace_h"] = grace_ns // (3_600 * 10**9)
        report = collect_garbage(store, None, CollectionRequest(grace_ns))
        for dot in report.dots:
            if dot.skipped is not None:
                raise dot.skipped

    return locally(change, "never")


_MOVED: Final = frozenset(
    {RefStatus.CREATED, RefStatus.FAST_FORWARD, RefStatus.FORCED, RefStatus.STASHED}
)
