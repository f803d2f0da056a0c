"""Working trees: where a branch's files are, and what changed in them.

A dot is either attached (`--at DIR`: one tree, holding the branch that was checked out last) or
managed (a tree per branch inside the store, made when first needed). How trees are written and
switched is in engine/switching.py.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Final

from dmsync.core.events import (
    TreeAttached,
    TreeDetached,
)
from dmsync.core.ids import DotId, Kind, ObjectId, object_id
from dmsync.core.objects import (
    ROOT_ENTRY,
    Entry,
    EntryKind,
    commit_from_bytes,
)
from dmsync.core.pages import (
    PageReader,
    directory_entries,
    find_entry,
)
from dmsync.core.values import plain_value_type
from dmsync.engine.capture import CaptureResult, capture_tree, status_of_tree
from dmsync.engine.differences import Change, tree_differences
from dmsync.engine.file_content import ChunkWriter
from dmsync.engine.progress import Progress
from dmsync.engine.safe_files import remove_tree
from dmsync.engine.store import Store
from dmsync.engine.tree_users import refuse_in_use
from dmsync.errors import CaptureFailed, DmError, WouldLose
from dmsync.storage.catalog_rows import ConflictRow, MergeRow, SwitchRow
from dmsync.storage.chunk_forms import NewChunk, PreparedChunk
from dmsync.storage.durable import fsync_directory, make_directory_durable
from dmsync.storage.stat_cache import StatCache

DEFAULT_SUBDOT: Final = b"__default__"
ATTACHED_STAT: Final = "__attached__"
"""Stat cache of an attached directory: no branch can have this name."""


@plain_value_type
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


@plain_value_type
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
    merge: MergeRow | None = None
    """What is being merged into the branch."""
    conflicts: tuple[ConflictRow, ...] = ()
    """Of that merge, by path, resolved ones too."""


class _DryWriter:
    """Stands in for a pack writer: computes ids, keeps pages, stores nothing.

    Also reads, so that a tree captured with it can be compared with a stored one.
    """

    def __init__(self, store: PageReader) -> None:
        self._store = store
        self._pages: dict[ObjectId, bytes] = {}

    def prepare(self, runs: Sequence[Sequence[NewChunk]], *, similar: bool) -> list[PreparedChunk]:
        return []

    def put_prepared(self, chunks: Sequence[PreparedChunk]) -> None:
        pass

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
    if store.is_past:
        return None  # what is in the directories now is of another time
    attached = store.catalog.tree(dot)
    if attached is not None:
        switching = attached.switching_to
        if branch != (switching.branch if switching else attached.branch):
            return None
    place = place_for(store, dot, branch)
    return place if place.attached or os.path.isdir(place.path) else None


def place_for(store: Store, dot: DotId, branch: str) -> TreePlace:
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


def settle_places(store: Store, dot: DotId) -> None:
    """Let managed trees follow their branches where a kill came between: one whose branch was
    renamed is renamed, one whose branch was deleted (and its state stored) is removed."""
    if store.catalog.tree(dot) is not None:
        return
    try:
        found = set(os.listdir(store.layout.trees_dir(dot)))
    except FileNotFoundError:
        return
    found -= {row.short_name for row in store.catalog.branches(dot)}
    for name in sorted(found - {store.catalog.head(dot)}):
        place = place_for(store, dot, name)
        last = store.catalog.reflog(dot, f"branch/{name}", count=1)
        if last:
            # Any other kind: it is unborn again, and its tree holds what was never committed.
            if last[0].kind == "delete":
                discard_place(store, dot, place)
            continue
        renamed = store.catalog.branch_renamed_from(dot, name)  # its reflog went with it
        if renamed is not None and place_of(store, dot, renamed) is None:
            rename_place(store, dot, place, renamed)


def discard_place(store: Store, dot: DotId, place: TreePlace) -> None:
    """Remove the managed tree of a deleted branch, whose state has been stored."""
    assert not place.attached, "an attached directory is the user's"
    remove_tree(place.path)
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


def status(store: Store, dot: DotId, progress: Progress | None = None) -> StatusReport:
    """Uncommitted changes of the current branch's tree. Reads only; waits for nothing."""
    branch = store.catalog.head(dot)
    tip = branch_tip(store, dot, branch)
    place = place_of(store, dot, branch)
    if place is None:
        try:
            refuse_lost(store, dot, branch)
        except CaptureFailed as problem:
            return StatusReport(branch, tip, [], 0, False, problem=problem)
        return StatusReport(branch, tip, [], 0, False)
    try:
        check_place(store, dot, place, accept_moved=False)
    except CaptureFailed as problem:
        return StatusReport(branch, tip, [], 0, False, problem=problem)
    changes = tree_changes(store, dot, place, store.root(dot, tip), progress)
    switching = any(switch.branch == branch for switch in store.catalog.switches(dot))
    return StatusReport(
        branch,
        tip,
        changes,
        _bytes_of(changes),
        True,
        switching,
        merge=store.catalog.merge(dot, branch),
        conflicts=tuple(store.catalog.conflicts(dot, branch)),
    )


def _bytes_of(changes: Iterable[Change]) -> int:
    return sum(change.new.size for change in changes if change.new and not change.metadata_only)


def tree_changes(
    store: Store,
    dot: DotId,
    place: TreePlace,
    against: Entry,
    progress: Progress | None = None,
) -> list[Change]:
    """Changes that lead from `against` to the live tree, sorted by path; stores nothing."""
    cache = StatCache.load(place.stat_path)
    for switch in store.catalog.switches(dot):
        if place.attached or switch.branch == place.branch:
            cache = _doubted_cache(store, dot, place, switch)
    if cache is None or cache.root == against:
        return status_of_tree(
            tree_path=place.path,
            as_subdot=place.subdot,
            store=store.objects(dot),
            base=against,
            stat_cache=cache,
            now_ns=store.clock()[0],
            root_metadata=place.root_metadata,
            scope=store.scope(dot),
            progress=progress,
        ).changes
    # The tree was last known as something else (a working snapshot came back): what the cache
    # vouches for belongs to that state, so the tree is read against it and compared afterwards.
    writer = _DryWriter(store.objects(dot))
    live = capture(store, dot, place, writer, progress)
    return tree_differences(writer, against, live.root)


def live_root(
    store: Store, dot: DotId, place: TreePlace, progress: Progress | None = None
) -> tuple[PageReader, Entry]:
    """The live tree as it would be recorded now, and a reader of its pages; stores nothing."""
    writer = _DryWriter(store.objects(dot))
    return writer, capture(store, dot, place, writer, progress).root


def changes_towards(store: Store, dot: DotId, place: TreePlace, target: Entry) -> list[Change]:
    """Changes that would make the live tree equal to `target`."""
    writer = _DryWriter(store.objects(dot))
    live = capture(store, dot, place, writer, None)
    return tree_differences(writer, live.root, target)


def refuse_if_dirty(store: Store, dot: DotId, branch: str) -> None:
    """Refuse to write over uncommitted changes of a materialised branch.

    Raises:
        WouldLose: the tree differs from the tip, or processes are writing in it.
    """
    place = place_of(store, dot, branch)
    if place is None:
        return
    refuse_in_use(place.path, insist="")
    merge = store.catalog.merge(dot, branch)
    if merge is not None:
        raise WouldLose(
            f"a {merge.kind} into {branch} is under way where data would be written",
            hint="conclude or abort it there: dm merge --continue, dm merge --abort",
        )
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
        scope=store.scope(dot),
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


def refuse_lost(store: Store, dot: DotId, branch: str) -> None:
    """Refuse to take a managed tree that had files, and is gone as a whole, for one yet to be made.

    Raises:
        CaptureFailed: naming its directory.
    """
    if store.is_past or store.catalog.tree(dot) is not None:
        return
    place = place_for(store, dot, branch)
    if os.path.lexists(place.path) or os.path.lexists(place.path + b".new"):
        return  # it is there, or was being made
    cache = StatCache.load(place.stat_path)
    if cache is None or not any(entry.tree for entry in _subdots(store.objects(dot), cache.root)):
        return
    raise CaptureFailed(
        f"the working tree of branch {branch} had files and is gone: {os.fsdecode(place.path)}",
        hint="is its disk mounted? `dm dot path` writes out what was last committed, and so does "
        "`dm commit --accept-moved-tree`",
    )


def _subdots(reader: PageReader, root: Entry) -> Iterator[Entry]:
    for entry in directory_entries(reader, root.tree):
        if entry.kind is EntryKind.DIRECTORY:
            yield entry


def save_doubted_cache(store: Store, dot: DotId, place: TreePlace, switch: SwitchRow) -> None:
    """Take from a tree's stat cache, durably, what a cut switch makes doubtful."""
    doubted = _doubted_cache(store, dot, place, switch)
    if doubted is not None:
        doubted.save(place.stat_path)
    elif os.path.exists(place.stat_path):
        os.unlink(place.stat_path)
        fsync_directory(os.path.dirname(place.stat_path))


def _doubted_cache(
    store: Store, dot: DotId, place: TreePlace, switch: SwitchRow
) -> StatCache | None:
    """The stat cache of a tree whose switch was cut: it vouches for no file that the switch was
    changing. None: for nothing at all."""
    cache = StatCache.load(place.stat_path)
    if cache is None:
        return None
    try:
        target = snapshot_root(store, dot, switch.to_root_commit)
        changes = tree_differences(store.objects(dot), cache.root, target, renames=False)
    except DmError:  # what the switch led to is damaged or gone
        return None
    files = [
        change.path
        for change in changes
        if change.old is not None and change.old.kind is EntryKind.FILE
    ]
    return cache.doubting(files)


def snapshot_root(store: Store, dot: DotId, commit: ObjectId | None) -> Entry:
    """Root of a commit or of a working snapshot (which the graph does not hold).

    Raises:
        ContentAbsent: only the record of the commit is here.
    """
    if commit is None:
        return ROOT_ENTRY
    if store.catalog.has_commit(dot, commit):
        return store.root(dot, commit)
    return commit_from_bytes(store.objects(dot).read_commit(commit), trusted=True).root
