"""Working trees: where a branch's files are, what changed in them, and how they are switched.

A dot is either attached (`--at DIR`: one tree, holding the branch that was checked out last) or
managed (a tree per branch inside the store, made when first needed). A switch is journaled in the
event log before the first file changes; a tree found switching is finished before anything else
is done with it (design 5).
"""

import contextlib
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from dmsync.core.events import (
    CommitsAdded,
    Event,
    RefChanged,
    TreeAttached,
    TreeDetached,
    TreeSwitchFinished,
    TreeSwitchStarted,
)
from dmsync.core.ids import DotId, Kind, ObjectId, object_id
from dmsync.core.objects import (
    ROOT_ENTRY,
    Commit,
    Entry,
    EntryKind,
    Layout,
    commit_from_bytes,
)
from dmsync.core.pages import (
    MANIFEST,
    ZERO_RUN,
    PageReader,
    Span,
    differing_items,
    directory_entries,
    file_spans,
    find_entry,
)
from dmsync.engine.capture import CaptureResult, Progress, capture_tree, status_of_tree
from dmsync.engine.differences import Change, tree_differences
from dmsync.engine.file_content import ChunkWriter
from dmsync.engine.restore import RestoreResult, restore_tree
from dmsync.engine.store import Store
from dmsync.errors import CaptureFailed, NotFound, StorageFull, WouldLose
from dmsync.storage.catalog import SwitchRow
from dmsync.storage.durable import make_directory_durable
from dmsync.storage.pack_writer import PackWriter
from dmsync.storage.stat_cache import StatCache

DEFAULT_SUBDOT: Final = b"__default__"
ATTACHED_STAT: Final = "__attached__"
"""Stat cache of an attached directory: no branch can have this name."""


@dataclass(frozen=True)
class TreePlace:
    """Where the tree of `branch` is. `subdot` is the subdot that `path` stands for, or None when
    `path` is the dot's root."""

    branch: str
    path: bytes
    subdot: bytes | None
    stat_path: str
    attached: bool
    root_metadata: bool = False
    """The directory's own mode, owner and attributes are part of the dot (`--as-root`)."""


@dataclass(frozen=True)
class StatusReport:
    """The working tree of the current branch against its tip. `changes` is sorted by path."""

    branch: str
    head: ObjectId | None
    changes: list[Change]
    dirty_bytes: int
    materialised: bool
    switching: bool = False
    """A kill cut a switch of this tree short: the next changing command completes it."""
    problem: CaptureFailed | None = None
    """The attached directory is gone or another one; its changes are not told then."""


class _DryWriter:
    """Stands in for a pack writer: computes ids, keeps pages, stores nothing.

    Also reads, so that a tree captured with it can be compared with a stored one.
    """

    def __init__(self, store: PageReader) -> None:
        self._store = store
        self._pages: dict[ObjectId, bytes] = {}

    def put(
        self, kind: Kind, data: bytes, *, base: ObjectId | None = None, similar: bool = False
    ) -> ObjectId:
        return object_id(kind, data)

    def write_page(self, data: bytes, base: ObjectId | None) -> ObjectId:
        page = object_id(Kind.PAGE, data)
        self._pages[page] = data
        return page

    def read_page(self, page: ObjectId) -> bytes:
        found = self._pages.get(page)
        return found if found is not None else self._store.read_page(page)


# --- where trees are -----------------------------------------------------------------------------


def place_of(store: Store, dot: DotId, branch: str) -> TreePlace | None:
    """The tree of `branch`, or None where it is not materialised (a bare dot, another branch).

    An attached directory that is being switched counts as the branch it is switched to.
    """
    attached = store.catalog.tree(dot)
    if attached is not None:
        switching = attached.switching_to
        if branch != (switching.branch if switching else attached.branch):
            return None
    place = _place_for(store, dot, branch)
    return place if place.attached or os.path.isdir(place.path) else None


def _place_for(store: Store, dot: DotId, branch: str) -> TreePlace:
    """Where the tree of `branch` is, or will be when the switch under way is done."""
    attached = store.catalog.tree(dot)
    if attached is None:
        path = os.fsencode(store.layout.tree_dir(dot, branch))
        stat_path = store.layout.stat_cache_file(dot, branch)
        return TreePlace(branch, path, None, stat_path, False)
    subdot = None if attached.as_root else DEFAULT_SUBDOT
    # One directory has one cache, whatever branch it holds: what is known of a file stays known.
    stat_path = store.layout.stat_cache_file(dot, ATTACHED_STAT)
    return TreePlace(branch, attached.path, subdot, stat_path, True, attached.as_root)


def make_place(store: Store, dot: DotId, branch: str, progress: Progress | None) -> TreePlace:
    """The tree of `branch`, made from its tip when a managed dot has none yet.

    The tree is built beside its place and renamed, so that a kill leaves none or a whole one.
    """
    place = place_of(store, dot, branch)
    if place is not None:
        return place
    if store.catalog.tree(dot) is not None:
        raise NotFound(f"branch {branch} is not the one materialised in the attached directory")
    final = store.layout.tree_dir(dot, branch)
    building = f"{final}.new"
    make_directory_durable(building)
    place = TreePlace(
        branch, os.fsencode(building), None, store.layout.stat_cache_file(dot, branch), False
    )
    _restore(store, dot, place, branch_tip(store, dot, branch), progress)
    if not os.listdir(building):
        os.mkdir(os.path.join(building, os.fsdecode(DEFAULT_SUBDOT)), 0o755)
    os.rename(building, final)
    return TreePlace(branch, os.fsencode(final), None, place.stat_path, False)


def branch_tip(store: Store, dot: DotId, branch: str) -> ObjectId | None:
    """Tip of a branch; None when unborn or unknown."""
    row = store.catalog.branch(dot, branch)
    return None if row is None else row.target


def require_place(store: Store, dot: DotId, branch: str) -> TreePlace:
    """The materialised tree of `branch`. Raises CaptureFailed where there is none."""
    place = place_of(store, dot, branch)
    if place is None:
        raise CaptureFailed(f"branch {branch} has no working tree")
    return place


def record_moved(store: Store, dot: DotId, place: TreePlace) -> None:
    """Take the directory now at the attached path for the dot's tree; make one that is lost."""
    if not place.attached:
        return
    make_directory_durable(os.fsdecode(place.path), mode=0o755)
    found = os.stat(place.path)
    recorded = store.catalog.tree(dot)
    if recorded and (found.st_dev, found.st_ino) != (recorded.device, recorded.inode):
        event = TreeAttached(dot, place.path, place.root_metadata, found.st_dev, found.st_ino)
        with store.transaction("accept-moved-tree") as tx:
            tx.append(TreeDetached(dot))
            tx.append(event)


def rename_place(store: Store, dot: DotId, place: TreePlace, branch: str) -> None:
    """Let the managed tree of a renamed branch follow its name."""
    if place.attached:
        return
    if os.path.exists(place.stat_path):
        os.replace(place.stat_path, store.layout.stat_cache_file(dot, branch))
    os.rename(place.path, os.fsencode(store.layout.tree_dir(dot, branch)))


def discard_place(store: Store, dot: DotId, place: TreePlace) -> None:
    """Remove the managed tree of a deleted branch, whose state has been stored."""
    assert not place.attached, "an attached directory is the user's"
    shutil.rmtree(place.path)
    with contextlib.suppress(FileNotFoundError):
        os.unlink(place.stat_path)


def check_place(store: Store, dot: DotId, place: TreePlace, *, accept_moved: bool) -> None:
    """Refuse a tree that is not the one recorded: an unmounted disk must not become a commit.

    Raises:
        CaptureFailed: DIR is missing, on another filesystem or another directory.
    """
    recorded = store.catalog.tree(dot)
    try:
        found = os.stat(place.path)
    except OSError as exc:
        raise CaptureFailed(
            f"the directory of this dot cannot be read: {os.fsdecode(place.path)}",
            hint="mount it; `dm reset --hard HEAD --accept-moved-tree` writes it out again",
        ) from exc
    if recorded is None or accept_moved:
        return
    if (found.st_dev, found.st_ino) != (recorded.device, recorded.inode):
        raise CaptureFailed(
            f"{os.fsdecode(place.path)} is not the directory that was attached "
            "(another filesystem or inode)",
            hint="is the disk mounted? `--accept-moved-tree` records the new directory",
        )


# --- what changed --------------------------------------------------------------------------------


def status(store: Store, dot: DotId) -> StatusReport:
    """Uncommitted changes of the current branch's tree. Reads only; waits for nothing."""
    branch = store.catalog.head(dot)
    tip = branch_tip(store, dot, branch)
    place = place_of(store, dot, branch)
    if place is None:
        return StatusReport(branch, tip, [], 0, False)
    try:
        check_place(store, dot, place, accept_moved=False)
    except CaptureFailed as problem:
        return StatusReport(branch, tip, [], 0, False, problem=problem)
    changes = tree_changes(store, dot, place, store.root(dot, tip))
    switching = any(switch.branch == branch for switch in store.catalog.switches(dot))
    return StatusReport(branch, tip, changes, _bytes_of(changes), True, switching)


def _bytes_of(changes: Iterable[Change]) -> int:
    return sum(change.new.size for change in changes if change.new and not change.metadata_only)


def tree_changes(store: Store, dot: DotId, place: TreePlace, against: Entry) -> list[Change]:
    """Changes that lead from `against` to the live tree, sorted by path; stores nothing."""
    cache = StatCache.load(place.stat_path)
    if cache is None or cache.root == against:
        return status_of_tree(
            tree_path=place.path,
            as_subdot=place.subdot,
            store=store.objects(dot),
            base=against,
            stat_cache=cache,
            now_ns=store.clock()[0],
            root_metadata=place.root_metadata,
        ).changes
    # The tree was last known as something else (a working snapshot came back): what the cache
    # vouches for belongs to that state, so the tree is read against it and compared afterwards.
    writer = _DryWriter(store.objects(dot))
    live = capture(store, dot, place, writer, None)
    return tree_differences(writer, against, live.root)


def changes_towards(store: Store, dot: DotId, place: TreePlace, target: Entry) -> list[Change]:
    """Changes that would make the live tree equal to `target`."""
    writer = _DryWriter(store.objects(dot))
    live = capture(store, dot, place, writer, None)
    return tree_differences(writer, live.root, target)


def refuse_if_dirty(store: Store, dot: DotId, branch: str) -> None:
    """Refuse to write over uncommitted changes of a materialised branch.

    Raises:
        WouldLose: the tree differs from the tip.
    """
    place = place_of(store, dot, branch)
    if place is None:
        return
    changes = tree_changes(store, dot, place, store.root(dot, branch_tip(store, dot, branch)))
    if changes:
        mebibytes = _bytes_of(changes) / 2**20
        raise WouldLose(
            f"Aborting because there are {mebibytes:.2f} MiB of uncommitted changes on volume "
            "where data would be written",
            hint="commit them there, `dm reset --hard HEAD` there, or use --stash-on-divergence",
            paths=len(changes),
        )


def capture(
    store: Store,
    dot: DotId,
    place: TreePlace,
    writer: ChunkWriter,
    progress: Progress | None,
) -> CaptureResult:
    """Read the live tree into `writer`; the caller seals it and saves the stat cache."""
    cache = StatCache.load(place.stat_path)
    tip = branch_tip(store, dot, place.branch)
    return capture_tree(
        tree_path=place.path,
        as_subdot=place.subdot,
        store=store.objects(dot),
        writer=writer,
        base=cache.root if cache is not None else store.root(dot, tip),
        stat_cache=cache,
        now_ns=store.clock()[0],
        root_metadata=place.root_metadata,
        progress=progress,
    )


def refuse_emptied(objects: PageReader, before: Entry, after: Entry) -> None:
    """Refuse a commit in which a subdot that had files is empty: a disk that is not mounted.

    Raises:
        CaptureFailed: naming the subdot.
    """
    for entry in _subdots(objects, before):
        now = find_entry(objects, after.tree, entry.name)
        if entry.tree is not None and (now is None or now.tree is None):
            raise CaptureFailed(
                f"subdot {os.fsdecode(entry.name)} had files and is now empty or gone",
                hint="is its disk mounted? `--accept-moved-tree` commits it as it is",
            )


def _subdots(reader: PageReader, root: Entry) -> Iterator[Entry]:
    for entry in directory_entries(reader, root.tree):
        if entry.kind is EntryKind.DIRECTORY:
            yield entry


# --- switching -----------------------------------------------------------------------------------


def save_working(
    store: Store, dot: DotId, place: TreePlace, reason: str, progress: Progress | None
) -> ObjectId | None:
    """Store the tree's uncommitted state as a snapshot commit on its branch's tip.

    Returns the snapshot, durable, or None when the tree equals the tip.

    Raises:
        WouldLose: something in the tree cannot be read.
    """
    tip = branch_tip(store, dot, place.branch)
    with store.objects(dot).writer() as writer:
        result = capture(store, dot, place, writer, progress)
        _refuse_unreadable(result, reason)
        before = store.root(dot, tip)
        if result.root == before:
            return None
        commit_id = _put_snapshot(store, writer, place.branch, result.root, tip, reason)
        writer.seal()
    result.stat_cache.save(place.stat_path)
    return commit_id


def _put_snapshot(
    store: Store,
    writer: PackWriter,
    branch: str,
    root: Entry,
    parent: ObjectId | None,
    reason: str,
) -> ObjectId:
    """Write the snapshot commit of a tree's uncommitted state; the caller seals."""
    now_ns, offset_minutes = store.clock()
    snapshot = Commit(
        root=root,
        parents=() if parent is None else (parent,),
        author=store.settings.author,
        committer=store.settings.author,
        time_ns=now_ns,
        offset_minutes=offset_minutes,
        message=f"uncommitted state of {branch} before {reason}",
    )
    return writer.put(Kind.COMMIT, snapshot.to_bytes())


def stash_events(
    store: Store, dot: DotId, snapshot: ObjectId, what: str
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
    return name, [added, RefChanged(dot, name, None, snapshot, "stash", f"before {what}")]


def _refuse_unreadable(result: CaptureResult, reason: str) -> None:
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
        if finish:
            finish_switch(store, dot, progress)
        yield


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
    place = _place_for(store, dot, switch.branch)
    check_place(store, dot, place, accept_moved=False)
    stash_found(store, dot, switch, progress)
    _restore(store, dot, place, switch.to_root_commit, progress)
    with store.transaction("finish-switch") as tx:
        tx.append(TreeSwitchFinished(dot, switch.branch))
    return True


def stash_found(store: Store, dot: DotId, switch: SwitchRow, progress: Progress | None) -> None:
    """Keep what a half switched tree holds: somebody may have worked in it since the kill.

    What is merely the old or the new state is not kept again.
    """
    place = _place_for(store, dot, switch.branch)
    known = {
        snapshot_root(store, dot, commit) for commit in (switch.from_commit, switch.to_root_commit)
    }
    with store.objects(dot).writer() as writer:
        result = capture(store, dot, place, writer, progress)
        _refuse_unreadable(result, "switch")
        if result.root in known:
            return
        snapshot = _put_snapshot(
            store, writer, place.branch, result.root, switch.to_root_commit, "switch"
        )
        writer.seal()
    name, events = stash_events(store, dot, snapshot, "interrupted-switch")
    with store.transaction("finish-switch") as tx:
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
    trusted: bool = False,
    progress: Progress | None = None,
) -> RestoreResult | None:
    """Record `events` and make the tree of `branch` hold commit `target`, in that order, durably.

    The caller holds the dot's lock and has stored what the tree held. Without a materialised tree
    only the events are recorded. `trusted` also applies devices, setuid, setgid, capabilities.

    Raises:
        Corruption, StorageFull: found before anything was recorded or changed.
    """
    attached = store.catalog.tree(dot)
    materialised = attached is not None or place_of(store, dot, branch) is not None
    if materialised:
        _refuse_impossible(store, dot, _place_for(store, dot, branch), target)
    before = branch_tip(store, dot, attached.branch if attached is not None else branch)
    with store.transaction(command) as tx:
        for event in events:
            tx.append(event)
        if materialised:
            tx.append(TreeSwitchStarted(dot, branch, before, target, command))
    if not materialised:
        return None
    place = _place_for(store, dot, branch)
    result = _restore(store, dot, place, target, progress, trusted=trusted)
    with store.transaction(command) as tx:
        tx.append(TreeSwitchFinished(dot, branch))
    return result


def _refuse_impossible(store: Store, dot: DotId, place: TreePlace, target: ObjectId | None) -> None:
    """Find what would stop a switch half way while nothing has changed yet: damaged objects, a
    full disk. What the tree holds is known from its cache; without one only space is judged."""
    cache = StatCache.load(place.stat_path)
    objects = store.objects(dot)
    before = ROOT_ENTRY if cache is None else cache.root
    growth = largest = 0
    changes = tree_differences(objects, before, snapshot_root(store, dot, target), renames=False)
    for change in changes:
        new, old = change.new, change.old
        if new is None or new.kind is not EntryKind.FILE or change.metadata_only:
            continue
        if not new.sparse:
            growth += new.size - (old.size if old and old.kind is EntryKind.FILE else 0)
            largest = max(largest, new.size)
        if cache is not None:
            for chunk in _differing_chunks(objects, old, new):
                objects.read_chunk(chunk)
    space = os.statvfs(place.path)
    if growth > 0 and growth + largest > space.f_bavail * space.f_frsize:
        raise StorageFull(
            f"the tree would grow by {growth / 2**20:.1f} MiB, "
            f"and {os.fsdecode(place.path)} has not that much room",
            hint="free some space; nothing was changed",
        )


def _differing_chunks(reader: PageReader, old: Entry | None, new: Entry) -> Iterator[ObjectId]:
    """Chunks of `new` that are not at hand in `old`; of in-place files only the changed pages'."""
    if old is not None and old.layout is Layout.FIXED and new.layout is Layout.FIXED:
        was, now, _ = differing_items(reader, old.tree, new.tree, MANIFEST)
        spans: Iterable[Span] = set(now) - set(was)
    else:
        spans = file_spans(reader, new)
    return (span.chunk for span in spans if span.chunk != ZERO_RUN)


def _restore(
    store: Store,
    dot: DotId,
    place: TreePlace,
    target: ObjectId | None,
    progress: Progress | None,
    *,
    trusted: bool = False,
) -> RestoreResult:
    cache = StatCache.load(place.stat_path)
    root = snapshot_root(store, dot, target)
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
        progress=progress,
    )
    make_directory_durable(os.path.dirname(place.stat_path))
    result.stat_cache.save(place.stat_path)
    return result


def snapshot_root(store: Store, dot: DotId, commit: ObjectId | None) -> Entry:
    """Root of a commit or of a working snapshot (which the graph does not hold)."""
    if commit is None:
        return ROOT_ENTRY
    return commit_from_bytes(store.objects(dot).read_commit(commit), trusted=True).root
