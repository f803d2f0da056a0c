"""Switching working trees: from one commit to another, journaled, with what is left stored first.

A switch is recorded in the event log before the first file changes; a tree found switching is
finished, or switched on, before anything else is done with it (design 5). What a command would
drop is stored first and gets a name: a branch's working snapshot, or a stash.
"""

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dmsync.core.events import (
    CommitsAdded,
    Event,
    RefChanged,
    TreeSwitchFinished,
    TreeSwitchStarted,
)
from dmsync.core.ids import DotId, Kind, ObjectId
from dmsync.core.objects import ROOT_ENTRY, Commit, Entry, EntryKind, Layout
from dmsync.core.pages import ZERO_RUN, PageReader, Span, file_spans
from dmsync.engine import trees
from dmsync.engine.capture import CaptureResult
from dmsync.engine.differences import Change, tree_differences
from dmsync.engine.differing_bytes import differing_spans
from dmsync.engine.progress import Progress
from dmsync.engine.store import Store
from dmsync.engine.tree_bounds import check_bounds
from dmsync.engine.tree_users import refuse_in_use
from dmsync.errors import NotFound, StorageFull, WouldLose
from dmsync.storage.catalog import SwitchRow
from dmsync.storage.durable import fsync_directory, make_directory_durable
from dmsync.storage.pack_writer import PackWriter
from dmsync.storage.stages import stage
from dmsync.storage.stat_cache import StatCache

if TYPE_CHECKING:
    from dmsync.engine.restoring.result import RestoreResult

FINISH_SWITCH: Final = "finish-switch"
"""Command name of operations that make good what a kill cut short."""
SNAPSHOT_BRANCH: Final = "branch"
"""Metadata key of a snapshot commit: the branch whose uncommitted state it is."""


def make_place(store: Store, dot: DotId, branch: str, progress: Progress | None) -> trees.TreePlace:
    """The tree of `branch`, made from its tip when a managed dot has none yet.

    The tree is built beside its place and renamed, so that a kill leaves none or a whole one.
    """
    place = trees.place_of(store, dot, branch)
    if place is not None:
        return place
    if store.catalog.tree(dot) is not None:
        raise NotFound(f"branch {branch} is not the one materialised in the attached directory")
    final = store.layout.tree_dir(dot, branch)
    building = f"{final}.new"
    make_directory_durable(building)
    place = trees.TreePlace(
        branch, os.fsencode(building), None, store.layout.stat_cache_file(dot, branch), False
    )
    tip = trees.branch_tip(store, dot, branch)
    _restore(store, dot, place, tip, progress, unseen=not os.listdir(building))
    kept = store.scope(dot)
    if not os.listdir(building) and (kept is None or trees.DEFAULT_SUBDOT in kept):
        os.mkdir(os.path.join(building, os.fsdecode(trees.DEFAULT_SUBDOT)), 0o755)
    fsync_directory(building)
    os.rename(building, final)
    fsync_directory(os.path.dirname(final))
    return trees.TreePlace(branch, os.fsencode(final), None, place.stat_path, False)


def save_working(
    store: Store,
    dot: DotId,
    place: trees.TreePlace,
    reason: str,
    progress: Progress | None,
    message: str = "",
) -> ObjectId | None:
    """Store the tree's uncommitted state as a snapshot commit on its branch's tip.

    Returns the snapshot, durable, or None when the tree equals the tip. `message` is the
    snapshot's, in place of one that names the branch and the reason.

    Raises:
        WouldLose: something in the tree cannot be read.
    """
    tip = trees.branch_tip(store, dot, place.branch)
    held = save_held(store, dot, place, (tip,), reason, progress, message)
    return None if held == tip else held


def save_held(
    store: Store,
    dot: DotId,
    place: trees.TreePlace,
    known: Sequence[ObjectId | None],
    reason: str,
    progress: Progress | None,
    message: str = "",
) -> ObjectId | None:
    """The commit whose tree the live tree holds: the first of `known` that it equals, else a new,
    durable snapshot commit on its branch's tip. None, the empty tree, may be among `known`.

    Raises:
        WouldLose: something in the tree cannot be read.
    """
    tip = trees.branch_tip(store, dot, place.branch)
    with store.objects(dot).writer() as writer:
        result = trees.capture(store, dot, place, writer, progress)
        refuse_unreadable(result, reason)
        for commit in known:
            if result.root == trees.snapshot_root(store, dot, commit):
                return commit
        snapshot = put_snapshot(store, writer, place.branch, result.root, tip, reason, message)
        writer.seal()
    result.stat_cache.save(place.stat_path)
    return snapshot


def put_snapshot(
    store: Store,
    writer: PackWriter,
    branch: str,
    root: Entry,
    parent: ObjectId | None,
    reason: str,
    message: str = "",
) -> ObjectId:
    """Write the snapshot commit of a tree's uncommitted state; the caller seals.

    Its metadata says which branch's tree it is, for whoever finds it under a stash ref.
    """
    now_ns, offset_minutes = store.clock()
    snapshot = Commit(
        root=root,
        parents=() if parent is None else (parent,),
        author=store.settings.author,
        committer=store.settings.author,
        time_ns=now_ns,
        offset_minutes=offset_minutes,
        message=message or f"uncommitted state of {branch} before {reason}",
        metadata=((SNAPSHOT_BRANCH, branch),),
    )
    return writer.put(Kind.COMMIT, snapshot.to_bytes())


def stash_events(
    store: Store, dot: DotId, snapshot: ObjectId, what: str, reason: str = ""
) -> tuple[str, list[Event]]:
    """A name for a snapshot of what a command discards, and the events that give it that name.

    `stash/<what>-<UTC time>` is an ordinary revision: it can be shown, checked out, reset to.
    """
    moment = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(store.clock()[0] // 1_000_000_000))
    name, number = f"stash/{what}-{moment}", 1
    while store.catalog.ref(dot, name) is not None:
        number += 1
        name = f"stash/{what}-{moment}-{number}"
    added = CommitsAdded(dot, (snapshot,))
    return name, [added, RefChanged(dot, name, None, snapshot, "stash", reason or f"before {what}")]


def refuse_unreadable(result: CaptureResult, reason: str) -> None:
    """What cannot be read cannot be stored first, so it must not be written over."""
    if result.unreadable_paths:
        first = result.unreadable_paths[0].decode("utf-8", "backslashreplace")
        raise WouldLose(
            f"{len(result.unreadable_paths)} paths cannot be read and would be lost by the "
            f"{reason}: {first}",
            hint="make them readable or move them away, or give them up with --discard",
            paths=len(result.unreadable_paths),
        )


@contextmanager
def ready(
    store: Store, dot: DotId, progress: Progress | None = None, *, finish: bool = True
) -> Iterator[None]:
    """Hold the dot's lock, with no tree of the current branch half switched: how every changing
    command begins. Without `finish` the caller is about to switch that tree anyway."""
    with store.dot_locked(dot):
        trees.settle_places(store, dot)
        if finish:
            finish_switch(store, dot, progress)
        else:
            _doubt_switching(store, dot)
        yield


def _doubt_switching(store: Store, dot: DotId) -> None:
    """Let the stat cache of a half switched tree no longer vouch for what the switch was changing.

    Finishing the switch needs none of that: it compares what it writes. Any other target takes
    from the tree what the cache vouches for, and after a loss of power a file that was changed in
    place may have its new bytes under its old times. Durable, so that it is remembered when the
    next switch is cut, too.
    """
    switch = pending_switch(store, dot, store.catalog.head(dot))
    if switch is not None:
        place = trees.place_for(store, dot, switch.branch)
        trees.save_doubted_cache(store, dot, place, switch)


def pending_switch(store: Store, dot: DotId, branch: str) -> SwitchRow | None:
    """The switch that a kill cut short: of the attached directory, or of `branch`'s own tree."""
    is_attached = store.catalog.tree(dot) is not None
    for switch in store.catalog.switches(dot):
        if is_attached or switch.branch == branch:
            return switch
    return None


def finish_switch(store: Store, dot: DotId, progress: Progress | None = None) -> bool:
    """Complete a switch of the current branch's tree. The caller holds the dot's lock."""
    switch = pending_switch(store, dot, store.catalog.head(dot))
    if switch is None:
        return False
    place = trees.place_for(store, dot, switch.branch)
    if not place.attached:
        make_place(store, dot, switch.branch, progress)
    trees.check_place(store, dot, place, accept_moved=False)
    refuse_in_use(place.path, insist="")
    stash_found(store, dot, switch, progress)
    _restore(store, dot, place, switch.to_root_commit, progress)
    with store.transaction(FINISH_SWITCH) as tx:
        tx.append(TreeSwitchFinished(dot, switch.branch))
    return True


def stash_found(store: Store, dot: DotId, switch: SwitchRow, progress: Progress | None) -> None:
    """Keep what a half switched tree holds: somebody may have worked in it since the kill.

    What is merely the old or the new state is not kept again.
    """
    place = trees.place_for(store, dot, switch.branch)
    known = {
        trees.snapshot_root(store, dot, commit)
        for commit in (switch.from_commit, switch.to_root_commit)
    }
    with store.objects(dot).writer() as writer:
        result = trees.capture(store, dot, place, writer, progress)
        refuse_unreadable(result, "switch")
        if result.root in known:
            return
        parent = switch.to_root_commit
        if parent is not None and not store.catalog.has_commit(dot, parent):
            parent = trees.branch_tip(store, dot, place.branch)  # a snapshot: no ref may need it
        snapshot = put_snapshot(store, writer, place.branch, result.root, parent, "switch")
        writer.seal()
    name, events = stash_events(store, dot, snapshot, "interrupted-switch")
    with store.transaction(FINISH_SWITCH) as tx:
        for event in events:
            tx.append(event)
    store.say(
        f"a switch of branch {place.branch} had been interrupted; "
        f"what its tree held meanwhile is kept as {name}"
    )


def switch_tree(
    store: Store,
    dot: DotId,
    *,
    branch: str,
    target: ObjectId | None,
    events: Iterable[Event],
    command: str,
    discarded: bool = False,
    trusted: bool = False,
    in_use: bool = False,
    progress: Progress | None = None,
) -> "RestoreResult | None":
    """Record `events` and make the tree of `branch` hold commit `target`, in that order, durably.

    The caller holds the dot's lock and has stored what the tree held. Without a materialised tree
    only the events are recorded. `discarded`: what the tree held was not stored, as the user
    wished. `trusted` also applies devices, setuid, setgid, capabilities.

    Raises:
        Corruption, StorageFull: found before anything was recorded or changed.
        WouldLose: processes are writing in the tree, and `in_use` does not allow that.
    """
    attached = store.catalog.tree(dot)
    materialised = attached is not None or trees.place_of(store, dot, branch) is not None
    if materialised:
        check_switch(store, dot, branch, target, in_use=in_use)
    before = trees.branch_tip(store, dot, attached.branch if attached is not None else branch)
    with store.transaction(command) as tx:
        for event in events:
            tx.append(event)
        if materialised:
            tx.append(TreeSwitchStarted(dot, branch, before, target, command, discarded))
    if not materialised:
        return None
    return complete_switch(
        store, dot, branch, target, command=command, trusted=trusted, progress=progress
    )


def switch_new_tree(
    store: Store,
    dot: DotId,
    *,
    branch: str,
    tip: ObjectId,
    target: ObjectId,
    events: Iterable[Event],
    command: str,
    trusted: bool = False,
    in_use: bool = False,
    progress: Progress | None = None,
) -> "RestoreResult":
    """As switch_tree, for a branch that has its tip `tip` by `events` alone and whose managed tree
    may yet have to be made."""
    check_switch(store, dot, branch, target, in_use=in_use)
    attached = store.catalog.tree(dot)
    before = tip if attached is None else trees.branch_tip(store, dot, attached.branch)
    with store.transaction(command) as tx:
        for event in events:
            tx.append(event)
        tx.append(TreeSwitchStarted(dot, branch, before, target, command))
    if attached is None:
        make_place(store, dot, branch, progress)
    return complete_switch(
        store, dot, branch, target, command=command, trusted=trusted, progress=progress
    )


def check_switch(
    store: Store, dot: DotId, branch: str, target: ObjectId | None, *, in_use: bool
) -> None:
    """Refuse a switch of the tree that is or will be that of `branch` while nothing has changed.

    Raises:
        Corruption, StorageFull: it could not be completed.
        WouldLose: processes are writing in the tree, and `in_use` does not allow that.
    """
    place = trees.place_for(store, dot, branch)
    if not in_use:
        refuse_in_use(place.path)
    _refuse_impossible(store, dot, place, target)


def complete_switch(
    store: Store,
    dot: DotId,
    branch: str,
    target: ObjectId | None,
    *,
    command: str,
    trusted: bool = False,
    progress: Progress | None = None,
) -> "RestoreResult":
    """Make the tree of `branch` hold `target`, as TreeSwitchStarted has just said that it will."""
    place = trees.place_for(store, dot, branch)
    result = _restore(store, dot, place, target, progress, trusted=trusted)
    with store.transaction(command) as tx:
        tx.append(TreeSwitchFinished(dot, branch))
    return result


def _refuse_impossible(
    store: Store, dot: DotId, place: trees.TreePlace, target: ObjectId | None
) -> None:
    """Find what would stop a switch half way while nothing has changed yet: damaged objects, a
    full disk. What the tree holds is known from its cache; without one only space is judged."""
    cache = StatCache.load(place.stat_path)
    objects = store.objects(dot)
    before = ROOT_ENTRY if cache is None else cache.root
    after = trees.snapshot_root(store, dot, target)
    where = place.path if os.path.isdir(place.path) else store.home
    check_bounds(objects, before.tree, after.tree, where)
    changes = tree_differences(objects, before, after, renames=False)
    room = _RoomNeeded()
    chunks = _chunks_to_write(objects, changes, room)
    with stage("verify"):
        for _ in chunks if cache is None else objects.read_many(Kind.CHUNK, chunks):
            pass
    space = os.statvfs(where)
    if room.growth > 0 and room.growth + room.largest > space.f_bavail * space.f_frsize:
        raise StorageFull(
            f"the tree would grow by {room.growth / 2**20:.1f} MiB, "
            f"and {os.fsdecode(place.path)} has not that much room",
            hint="free some space; nothing was changed",
        )


@dataclass
class _RoomNeeded:
    """Bytes by which files grow, and of the largest, of which two copies exist for a moment."""

    growth: int = 0
    largest: int = 0


def _chunks_to_write(
    reader: PageReader, changes: Iterable[Change], room: _RoomNeeded
) -> Iterator[ObjectId]:
    """Chunks of changed files that are not at hand in what they replace; adds up `room`."""
    for change in changes:
        new, old = change.new, change.old
        if new is None or new.kind is not EntryKind.FILE or change.metadata_only:
            continue
        is_file = old is not None and old.kind is EntryKind.FILE
        if not new.sparse:
            room.growth += new.size - (old.size if old is not None and is_file else 0)
            room.largest = max(room.largest, new.size)
        spans: Iterable[Span] = file_spans(reader, new)
        if old is not None and old.layout is Layout.FIXED and new.layout is Layout.FIXED:
            spans = (span for _, span in differing_spans(reader, old, new))
        yield from (span.chunk for span in spans if span.chunk != ZERO_RUN)


def _restore(
    store: Store,
    dot: DotId,
    place: trees.TreePlace,
    target: ObjectId | None,
    progress: Progress | None,
    *,
    trusted: bool = False,
    unseen: bool = False,
) -> "RestoreResult":
    from dmsync.engine.restore import restore_tree  # slow to import; a commit restores nothing

    cache = StatCache.load(place.stat_path)
    root = trees.snapshot_root(store, dot, target)
    result = restore_tree(
        tree_path=place.path,
        as_subdot=place.subdot,
        store=store.objects(dot),
        target=root,
        current=None if cache is None else cache.root,
        stat_cache=cache,
        now_ns=store.clock()[0],
        trusted=trusted,
        root_metadata=place.root_metadata,
        scope=store.scope(dot),
        unseen=unseen,
        progress=progress,
    )
    make_directory_durable(os.path.dirname(place.stat_path))
    result.stat_cache.save(place.stat_path)
    return result
