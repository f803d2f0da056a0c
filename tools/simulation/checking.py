"""What must hold after a run, whatever happened in it."""

import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Final

from blake3 import blake3

from dmsync.core.events import Operation, RefChanged
from dmsync.core.graph import is_ancestor
from dmsync.core.ids import ObjectId
from dmsync.engine.fsck import fsck
from dmsync.engine.store import Store
from dmsync.errors import (
    BadObject,
    Corruption,
    DmError,
    HashMismatch,
    ObjectMissing,
    ProtocolError,
)
from dmsync.storage.durable import lock_exclusively
from dmsync.storage.event_log import START, EventLog
from dmsync.storage.quarantine import Quarantine
from tools.simulation.history import Invocation
from tools.simulation.machines import Machine
from tools.simulation.steps import REFUSALS

if TYPE_CHECKING:
    from tools.simulation.world import World

Move = tuple[str, ObjectId | None, ObjectId | None]
"""(ref, old, new)."""
DAMAGE: Final = (BadObject, Corruption, HashMismatch, ObjectMissing, ProtocolError)
TEMPORARY: Final = ("tmp-", ".tmp-", ".new", ".dm-tmp")


def left_behind(world: "World") -> Iterator[str]:
    """What nobody has to hold or to keep when nothing runs any more, in words."""
    for machine in world.machines.values():
        yield from (f"{machine.name} crashed: {exc!r}" for exc in machine.crashes)
        yield from _taken_locks(machine)
        yield from _leftovers(machine)


def problems(world: "World") -> Iterator[str]:
    """Every broken promise, in words. The machines may have lost their power since."""
    logs: dict[str, list[Operation]] = {}
    for machine in world.machines.values():
        try:
            log = EventLog(os.path.join(machine.home, "events"))
            logs[machine.name] = [operation for operation, _ in log.read(START)]
        except DmError as exc:
            yield f"{machine.name}: its event log cannot be read: {exc.message}"
            return
    for machine in world.machines.values():
        yield from _lost_updates(machine.name, logs[machine.name])
        with closing(machine.open()) as store:
            yield from _unsound(machine, store, full=machine.name == world.looked_at)
            yield from _unadoptable(world, machine, store)
    yield from _damage_seen(world)
    yield from _broken_promises(world, logs)
    yield from _wrong_pushes(world, logs)
    yield from _not_healed(world)
    yield from _other_clone(world)


def history_hash(world: "World") -> str:
    """Of all event logs, byte for byte."""
    hasher = blake3()
    for name in sorted(world.machines):
        directory = os.path.join(world.machines[name].home, "events")
        for segment in sorted(os.listdir(directory)):
            if segment != "lock":
                with open(os.path.join(directory, segment), "rb") as file:
                    hasher.update(f"{name}/{segment}:".encode())
                    hasher.update(file.read())
    return hasher.hexdigest()[:16]


# --- refs -----------------------------------------------------------------------------------------


def _moves(operation: Operation) -> Iterator[Move]:
    for event in operation.events:
        if isinstance(event, RefChanged):
            yield event.name, event.old, event.new


def _lost_updates(name: str, log: list[Operation]) -> Iterator[str]:
    """Each ref is a register that is compared before it is set."""
    current: dict[str, ObjectId | None] = defaultdict(lambda: None)
    for operation in log:
        for ref, old, new in _moves(operation):
            if current[ref] != old:
                yield (
                    f"{name}: lost update: operation {operation.first_seq} ({operation.command}) "
                    f"moves {ref} from {_short(old)}, but it was at {_short(current[ref])}"
                )
            current[ref] = new


def _broken_promises(world: "World", logs: dict[str, list[Operation]]) -> Iterator[str]:
    """What was acknowledged is in the log of who promised it."""
    done: dict[str, set[Move]] = {
        name: {move for operation in log for move in _moves(operation)}
        for name, log in logs.items()
    }
    by_op = {(name, operation.op_id): operation for name, log in logs.items() for operation in log}
    for invocation in world.history:
        if invocation.result != "ok":
            continue
        for promise in invocation.promises:
            move = (promise.ref, promise.old, promise.new)
            found = move in done[promise.machine]
            if promise.op_id is not None:
                operation = by_op.get((promise.machine, promise.op_id))
                found = operation is not None and move in set(_moves(operation))
            if not found:
                yield (
                    f"{promise.machine}: acknowledged to #{invocation.number} and lost: "
                    f"{promise.ref} to {_short(promise.new)}"
                )


def _wrong_pushes(world: "World", logs: dict[str, list[Operation]]) -> Iterator[str]:
    """A push moves a branch forward, or as it was explicitly told to."""
    pushers = {f"step{i.number}": i for i in world.history if i.verb == "push_branches"}
    tracked = defaultdict[str, set[ObjectId | None]](set)
    for name in ("alice", "bob"):
        for operation in logs[name]:
            for ref, _, new in _moves(operation):
                if ref.startswith("remote/"):
                    tracked[name].add(new)
    with closing(world.server.open()) as store:
        graph = store.catalog.graph(world.dot)
        for operation in logs["server"]:
            pusher = pushers.get(operation.actor)
            if pusher is None:
                continue
            moves = list(_moves(operation))
            if moves and pusher.result == "failed":
                was = f"#{pusher.number} was refused ({pusher.error})"
                yield f"server: {was} and moved {moves[0][0]}"
            for ref, old, new in moves:
                if old is None or new is None:
                    continue
                if not (graph.has(old) and graph.has(new)) and not ref.startswith("tag/"):
                    continue  # gc has forgotten them since
                if ref.startswith("branch/") and is_ancestor(graph, old, new):
                    continue
                if not _is_as_told(pusher, moves, old, tracked):
                    yield (
                        f"server: lost update: push #{pusher.number} took {ref} from {_short(old)} "
                        f"to {_short(new)}, which does not contain it"
                    )


def _is_as_told(
    pusher: Invocation,
    moves: list[Move],
    old: ObjectId,
    tracked: dict[str, set[ObjectId | None]],
) -> bool:
    if pusher.facts.get("mode") == "stash":
        return any(was is None and new == old for _, was, new in moves)
    return pusher.facts.get("mode") == "lease" and old in tracked[pusher.machine]


# --- stores ---------------------------------------------------------------------------------------


def _unsound(machine: Machine, store: Store, *, full: bool) -> Iterator[str]:
    """Every object is read and hashed. With `full` the catalog is folded anew, too."""
    report = fsck(store, None if full else store.catalog.dots(), full=True)
    for problem in report.problems:
        yield f"{machine.name}: fsck: {problem.where}: {problem.message}"


def _unadoptable(world: "World", machine: Machine, store: Store) -> Iterator[str]:
    """What cut transfers left in quarantine is taken up by the next one, or thrown away."""
    directory = store.layout.quarantine_dir(world.dot)
    if not os.path.isdir(directory) or not os.listdir(directory):
        return
    objects = store.objects(world.dot)
    with Quarantine(objects) as quarantine:
        quarantine.discard()
    left = os.listdir(directory)
    if left:
        yield f"{machine.name}: {left[0]} in quarantine is neither taken up nor thrown away"


def _taken_locks(machine: Machine) -> Iterator[str]:
    """Nobody runs any more: all locks are free."""
    for path, _, names in os.walk(machine.home):
        for name in names:
            if name == "lock" or name.endswith(".lock"):
                fd = os.open(os.path.join(path, name), os.O_RDWR)
                try:
                    if not lock_exclusively(fd, wait=False):
                        yield f"{machine.name}: {os.path.join(path, name)} is still locked"
                finally:
                    os.close(fd)


def _leftovers(machine: Machine) -> Iterator[str]:
    """Temporary files are left by cuts and full disks alone, a few by each."""
    found = [
        os.path.join(path, name)
        for path, _, names in os.walk(machine.home)
        for name in names
        if any(mark in name for mark in TEMPORARY)
    ]
    troubles = machine.cuts_count + machine.failed_calls + machine.disk.failed_calls
    if len(found) > 4 * troubles:
        yield f"{machine.name}: {len(found)} temporary files after {troubles} troubles: {found[0]}"


def _damage_seen(world: "World") -> Iterator[str]:
    """Power cuts and failing system calls damage nothing that was promised, and all peers are
    honest: nobody may ever find damage, or a peer that breaks the rules."""
    for invocation, error in world.errors:
        if isinstance(error, DAMAGE):
            yield (
                f"#{invocation.number} {invocation.machine} {invocation.verb} found damage: "
                f"{invocation.error}"
            )


def _not_healed(world: "World") -> Iterator[str]:
    """With all troubles over every transfer succeeds, or is refused for a reason."""
    for invocation, error in world.errors:
        if invocation.began_s >= world.healed_s and not isinstance(error, REFUSALS):
            yield (
                f"#{invocation.number} {invocation.machine} {invocation.verb} failed although all "
                f"had healed: {invocation.error}"
            )


def _other_clone(world: "World") -> Iterator[str]:
    """A fresh clone has the server's branches and tags."""
    fresh = world.machines.get("fresh")
    if fresh is None:
        return
    with closing(fresh.open()) as clone, closing(world.server.open()) as server:
        for space in ("branch/", "tag/"):
            there = {row.name: row.target for row in server.catalog.refs(world.dot, space)}
            row = clone.catalog.dot(world.dot)
            here = {} if row is None else {
                found.name: found.target for found in clone.catalog.refs(world.dot, space)
            }  # fmt: skip
            if here != there:
                yield f"a fresh clone's {space} differ: {sorted(here)} and {sorted(there)}"


def _short(commit: ObjectId | None) -> str:
    return "nothing" if commit is None else commit.hex()[:8]
