"""Restore of single paths: what a commit holds there comes back into the working tree.

The branch does not move; what the tree held is stored first. Other paths keep what they hold: a
hardlink to a path that comes back is broken unless it still shares what the commit has there.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from dmsync.core.events import Event
from dmsync.core.ids import DotId, ObjectId
from dmsync.core.objects import Entry, EntryKind, check_name
from dmsync.core.pages import PageReader, walk_tree
from dmsync.engine import switching, trees
from dmsync.engine.differences import Change, joined, tree_differences
from dmsync.engine.history import resolve_revision
from dmsync.engine.progress import Progress
from dmsync.engine.recorded_tree import RecordedTree
from dmsync.engine.restore import needs_trust
from dmsync.engine.store import Store
from dmsync.engine.tree_edits import relink, replace_paths
from dmsync.errors import BadObject, ContentAbsent, PathNotFound, UsageError, WouldLose
from dmsync.storage.catalog import DotRow
from dmsync.storage.pack_writer import PackWriter

_NAMED_MAX = 3


@dataclass(frozen=True)
class PathRestoreRequest:
    """What a user asks of `dm restore`. Paths from the dot's root; b"." stands for everything."""

    revision: str
    paths: tuple[bytes, ...]
    delete: bool = False
    discard: bool = False
    accept_moved_tree: bool = False
    trusted: bool = False
    in_use: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class PathRestoreSummary:
    """What a restore changed (or would, with a dry run) in the tree; `stash` keeps what it held
    beyond the branch's tip, None when it held nothing more."""

    branch: str
    commit: ObjectId
    changes: tuple[Change, ...]
    stash: str | None = None
    files_written: int = 0
    files_removed: int = 0
    bytes_written: int = 0
    withheld: tuple[bytes, ...] = ()
    unapplied: tuple[bytes, ...] = ()
    trusted: tuple[bytes, ...] = ()
    """Without changes: paths whose devices, set-id bits or capabilities an earlier restore may have
    withheld, applied now."""


def restore_paths(
    store: Store, dot: DotRow, request: PathRestoreRequest, progress: Progress | None = None
) -> PathRestoreSummary:
    """Make the paths in the current branch's tree what `revision` has there; journaled.

    Raises:
        UsageError: something that is no path of a dot, or lies outside the attached directory.
        PathNotFound: a path that the commit lacks (and, with `delete`, the tree too).
        WouldLose: names would go and `delete` was not given; processes write in the tree.
        RevisionNotFound, CaptureFailed.
    """
    with switching.ready(store, dot.dot, progress):
        branch = store.catalog.head(dot.dot)
        commit = resolve_revision(store, dot, request.revision)
        place = switching.make_place(store, dot.dot, branch, progress)
        trees.check_place(store, dot.dot, place, accept_moved=request.accept_moved_tree)
        if request.accept_moved_tree and not request.dry_run:
            trees.record_moved(store, dot.dot, place)
        tip = trees.branch_tip(store, dot.dot, branch)
        with store.objects(dot.dot).writer() as writer:
            live = trees.capture(store, dot.dot, place, writer, progress)
            if not request.discard:
                switching.refuse_unreadable(live, "restore")
            source = RecordedTree(writer, store.root(dot.dot, commit))
            wanted = _wanted(request, place, RecordedTree(writer, live.root), source)
            root, changes = _new_root(writer, live.root, source, wanted)
            if not request.delete:
                _refuse_removal(changes, request.revision)
            waiting = _needing_trust(writer, wanted) if request.trusted and not changes else ()
            if request.dry_run or not (changes or waiting):
                return PathRestoreSummary(branch, commit, tuple(changes), trusted=waiting)
            stash, events = None, list[Event]()
            if live.root != store.root(dot.dot, tip) and not request.discard:
                held = switching.put_snapshot(store, writer, branch, live.root, tip, "restore")
                stash, events = switching.stash_events(store, dot.dot, held, "restore")
            target = _target(store, dot.dot, writer, branch, root, tip)
            writer.seal()
        live.stat_cache.save(place.stat_path)
        result = switching.switch_tree(
            store,
            dot.dot,
            branch=branch,
            target=target,
            events=events,
            command="restore",
            discarded=request.discard,
            trusted=request.trusted,
            in_use=request.in_use,
            progress=progress,
        )
    assert result is not None, "the tree was made before it was captured"
    return PathRestoreSummary(
        branch,
        commit,
        tuple(changes),
        stash,
        result.files_written,
        result.names_removed,
        result.bytes_written,
        tuple(result.withheld),
        tuple(result.unapplied),
        waiting,
    )


def _target(
    store: Store,
    dot: DotId,
    writer: PackWriter,
    branch: str,
    root: Entry,
    tip: ObjectId | None,
) -> ObjectId | None:
    """The commit whose tree the working tree gets: the tip, or a snapshot of what it is to be."""
    if root == store.root(dot, tip):
        return tip
    message = f"uncommitted state of {branch} after restore"
    return switching.put_snapshot(store, writer, branch, root, tip, "restore", message)


def _wanted(
    request: PathRestoreRequest, place: trees.TreePlace, live: RecordedTree, source: RecordedTree
) -> dict[bytes, Entry | None]:
    """The outermost of the paths with what the commit has there, None for what is to go."""
    paths = set()
    for given in request.paths:
        path = _checked(given)
        paths |= {path} if path else _everything(place, live, source)
    if not paths:
        raise UsageError("no paths to restore", hint="dm restore REV -- PATH...")
    wanted: dict[bytes, Entry | None] = {}
    for path in sorted(paths):
        if _is_below_another(path, paths):
            continue
        if place.subdot is not None and path.split(b"/")[0] != place.subdot:
            raise UsageError(
                f"{_shown(path)} lies outside the attached directory, "
                f"which holds the subdot {_shown(place.subdot)} alone",
                hint=f"paths begin with {_shown(place.subdot)}/ ; dm export writes others out",
            )
        entry = source.entry(path)
        if entry is None:
            _refuse_absent(path, request, live)
        wanted[path] = entry
    return wanted


def _everything(place: trees.TreePlace, live: RecordedTree, source: RecordedTree) -> set[bytes]:
    return {place.subdot} if place.subdot else {*live.entries(b""), *source.entries(b"")}


def _checked(given: bytes) -> bytes:
    """A path without slashes at its ends, empty for the whole tree. Raises UsageError."""
    if given in (b".", b"/"):
        return b""
    path = given.strip(b"/")
    try:
        for name in path.split(b"/"):
            check_name(name)
    except BadObject as exc:
        raise UsageError(
            f"{_shown(given) or 'an empty text'} is no path in a dot",
            hint="dm ls REV: shows them; `.` means everything",
        ) from exc
    return path


def _is_below_another(path: bytes, paths: set[bytes]) -> bool:
    while b"/" in path:
        path = path.rpartition(b"/")[0]
        if path in paths:
            return True
    return False


def _refuse_absent(path: bytes, request: PathRestoreRequest, live: RecordedTree) -> None:
    """What the commit lacks can only be removed, and only when it is there and that was asked."""
    is_here = live.entry(path) is not None
    if is_here and request.delete:
        return
    raise PathNotFound(
        f"no path {_shown(path)} in {request.revision}",
        hint="the working tree has it: --delete removes it (stored first)"
        if is_here
        else f"dm ls {request.revision}: lists what there is; dm restore REV -- PATH...",
        path=_shown(path),
    )


def _new_root(
    writer: PackWriter, live: Entry, source: RecordedTree, wanted: dict[bytes, Entry | None]
) -> tuple[Entry, list[Change]]:
    """The tree to be, and the changes that lead to it, sorted by path."""
    here = RecordedTree(writer, live)
    root = replace_paths(writer, here, wanted, source)
    changes = tree_differences(writer, live, root, renames=False)
    linked = relink(writer, root, live=here, source=source, changes=changes, wanted=wanted)
    if linked != root:
        changes = tree_differences(writer, live, linked, renames=False)
    return linked, changes


def _needing_trust(reader: PageReader, wanted: dict[bytes, Entry | None]) -> tuple[bytes, ...]:
    """Paths that are made in full only where the restore is trusted."""
    found = []
    for path, entry in wanted.items():
        if entry is None:
            continue
        if needs_trust(entry):
            found.append(path)
        if entry.kind is EntryKind.DIRECTORY:
            with suppress(ContentAbsent):  # a subdot that is not kept here
                below = walk_tree(reader, entry)
                found += [joined(path, name) for name, inner in below if needs_trust(inner)]
    return tuple(found)


def _refuse_removal(changes: Iterable[Change], revision: str) -> None:
    """Names go only when asked: a directory that comes back may hold new files of the user's."""
    removed = [change.path for change in changes if change.kind == "-"]
    if removed:
        named = ", ".join(_shown(path) for path in removed[:_NAMED_MAX])
        more = ", ..." if len(removed) > _NAMED_MAX else ""
        raise WouldLose(
            f"{revision} lacks {len(removed)} paths that would be removed: {named}{more}",
            hint="--delete removes them (stored first); --dry-run shows them",
            paths=len(removed),
        )


def _shown(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")
