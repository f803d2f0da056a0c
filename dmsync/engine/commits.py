"""Commit: the whole state of a dot becomes one durable point of its history."""

import grp
import os
import pwd
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from dmsync.core.events import Capture, CommitsAdded, MergeEnded, RefChanged, SignatureAdded
from dmsync.core.graph import is_ancestor
from dmsync.core.ids import Kind, ObjectId
from dmsync.core.objects import (
    MESSAGE_BYTES_MAX,
    METADATA_BYTES_MAX,
    Commit,
    Entry,
)
from dmsync.core.pages import PageReader
from dmsync.core.values import plain_value_type
from dmsync.engine import switching, trees
from dmsync.engine.capture import CaptureResult
from dmsync.engine.change_tally import TalliedChanges, tallied
from dmsync.engine.commit_deltas import keep_delta
from dmsync.engine.differences import Change, tree_differences
from dmsync.engine.file_content import ChunkWriter
from dmsync.engine.merging.state import pending_commit, refuse_merging, refuse_open_conflicts
from dmsync.engine.progress import Progress
from dmsync.engine.store import Store
from dmsync.errors import NothingToDo, UsageError, WouldLose
from dmsync.storage.catalog import DotRow
from dmsync.storage.catalog_rows import MergeRow

if TYPE_CHECKING:
    from dmsync.engine.signatures import SigningKey

METADATA_RESERVED = frozenset({"author", "date", "message", "commit", "timestamp", "type"})


@plain_value_type
class CommitRequest:
    """What a user asks of `dm commit`. `metadata` in the order given; keys distinct.

    `amend`: the commit takes the place of the branch's tip; an empty message keeps its message,
    `metadata` adds to its own. `amend_pushed` allows that for a tip that a remote holds.
    """

    message: str
    metadata: tuple[tuple[str, str], ...] = ()
    author: str | None = None
    fail_if_nothing: bool = False
    accept_moved_tree: bool = False
    dry_run: bool = False
    signing: "SigningKey | None" = None
    amend: bool = False
    amend_pushed: bool = False


@plain_value_type
class CommitSummary:
    """What a commit did. `commit` is None for a dry run. Sizes in bytes; `changes` against the
    parent, None when there are many of them and it is no dry run; `bytes_stored` is the growth of
    the dot's packs."""

    commit: ObjectId | None
    parents: tuple[ObjectId, ...]
    branch: str
    changes_count: int
    changes: list[Change] | None
    files_scanned: int
    bytes_scanned: int
    bytes_stored: int
    capture: Capture
    elapsed_s: float
    unstable_paths: list[bytes]
    unreadable_paths: list[bytes]


def commit(
    store: Store, dot: DotRow, request: CommitRequest, progress: Progress | None = None
) -> CommitSummary:
    """Commit all subdots of the current branch atomically; durable when it returns.

    Raises:
        UsageError: message or metadata out of bounds.
        NothingToDo: nothing changed and the request says to fail then.
        MergeConflict: a merge into the branch is under way, with conflicts to resolve.
        WouldLose, MergeConflict: there is no tip to amend, or not freely.
        CaptureFailed: a hook failed, the tree is not the recorded one, or a subdot was emptied.
        RefConflict: the branch moved meanwhile.
        SigningFailed: nothing was committed.
    """
    started = time.monotonic()
    if not request.amend:
        _checked_metadata(request)
    with switching.ready(store, dot.dot, progress):
        branch = store.catalog.head(dot.dot)
        tip = trees.branch_tip(store, dot.dot, branch)
        parents: tuple[ObjectId, ...] = () if tip is None else (tip,)
        merge = store.catalog.merge(dot.dot, branch)
        if request.amend:
            request, parents = _amending(store, dot, branch, tip, request)
        elif merge is not None:
            request, parents = _concluding(store, dot, merge, request, parents)
        metadata = _checked_metadata(request)
        compared = _compared_with(store, dot, tip, parents)
        if not request.accept_moved_tree:
            trees.refuse_lost(store, dot.dot, branch)
        place = switching.make_place(store, dot.dot, branch, progress)
        trees.check_place(store, dot.dot, place, accept_moved=request.accept_moved_tree)
        before = store.root(dot.dot, tip)
        objects = store.objects(dot.dot)
        with objects.writer() as writer:
            result, facts = _capture(store, dot, place, writer, progress)
            if result.root == before and request.fail_if_nothing and merge is None:
                raise NothingToDo("nothing changed since the last commit")
            if not request.accept_moved_tree:
                expected = before if merge is None else pending_commit(store, dot.dot, merge).root
                trees.refuse_emptied(writer, expected, result.root)
            compared_root = store.root(dot.dot, compared)
            changes = _changes_from(writer, compared_root, result)
            if request.dry_run:
                if changes.listed is None:
                    changes = tallied(tree_differences(writer, compared_root, result.root))
                return _summary(None, parents, branch, changes, result, 0, facts, started)
            value = _commit_value(store, dot, request, metadata, tip, parents, result.root, changes)
            new = writer.put(Kind.COMMIT, value.to_bytes())
            # before anything is kept: without its signature the commit is not wanted
            signature = _signature(request, new)
            if progress is not None:
                progress.phase("syncing")
            writer.seal()
            stored = writer.bytes_written
        with store.transaction("commit") as tx:
            tx.append(CommitsAdded(dot.dot, (new,), None, facts))
            kind = "amend" if request.amend else merge.kind if merge and merge.parents else "commit"
            tx.append(
                RefChanged(dot.dot, f"branch/{branch}", tip, new, kind, request.message[:200])
            )
            if signature is not None:
                tx.append(SignatureAdded(dot.dot, new, signature))
            if merge is not None:
                tx.append(MergeEnded(dot.dot, branch, "concluded"))
        result.stat_cache.save(place.stat_path)
        if request.accept_moved_tree:
            trees.record_moved(store, dot.dot, place)
        if parents and compared == parents[0]:
            keep_delta(store, dot.dot, new, changes.listed)
    return _summary(new, parents, branch, changes, result, stored, facts, started)


def _changes_from(writer: PageReader, before: Entry, result: CaptureResult) -> TalliedChanges:
    """What the captured tree changes against `before`."""
    if result.base == before and result.changes is not None:
        return result.changes.total()
    return tallied(tree_differences(writer, before, result.root))


def _concluding(
    store: Store,
    dot: DotRow,
    merge: MergeRow,
    request: CommitRequest,
    parents: tuple[ObjectId, ...],
) -> tuple[CommitRequest, tuple[ObjectId, ...]]:
    """The request completed from the merge under way that it concludes, and its parents.

    Raises:
        MergeConflict: conflicts are open.
    """
    refuse_open_conflicts(store, dot.dot, merge.branch)
    pending = pending_commit(store, dot.dot, merge)
    completed = replace(
        request,
        author=request.author or pending.author,
        metadata=request.metadata or pending.metadata,
    )
    return completed, merge.parents or parents


def _amending(
    store: Store, dot: DotRow, branch: str, tip: ObjectId | None, request: CommitRequest
) -> tuple[CommitRequest, tuple[ObjectId, ...]]:
    """The request completed from the tip that it replaces, and that one's parents.

    Raises:
        WouldLose: the tip is held by a remote, or there is none. MergeConflict: it is yet to be
            made, by the merge under way.
    """
    if tip is None:
        raise WouldLose(f"branch {branch} has no commits yet: there is nothing to amend")
    refuse_merging(store, dot.dot, branch)
    if not request.amend_pushed:
        _refuse_pushed(store, dot, tip)
    before = store.commit(dot.dot, tip)
    completed = replace(
        request,
        message=request.message or before.message,
        metadata=tuple({**dict(before.metadata), **dict(request.metadata)}.items()),
        author=request.author or before.author,
    )
    return completed, before.parents


def _refuse_pushed(store: Store, dot: DotRow, tip: ObjectId) -> None:
    """Others may build on what a remote holds: they would meet two histories."""
    graph = store.catalog.graph(dot.dot)
    for row in store.catalog.refs(dot.dot, "remote/"):
        _, remote, branch = row.name.split("/", 2)
        if not branch.startswith("tag/") and is_ancestor(graph, tip, row.target):
            raise WouldLose(
                f"commit {tip.hex()[:12]} is in branch {branch} of {remote} already: "
                "amended, this branch and that one diverge",
                hint="make a new commit; or --amend-pushed, and push with --force-with-lease",
                remote=remote,
            )


def _compared_with(
    store: Store, dot: DotRow, tip: ObjectId | None, parents: tuple[ObjectId, ...]
) -> ObjectId | None:
    """The commit whose tree the changes are told against: the first parent, when it is here."""
    if not parents:
        return None
    return tip if store.catalog.is_hollow(dot.dot, parents[0]) else parents[0]


def _capture(
    store: Store,
    dot: DotRow,
    place: trees.TreePlace,
    writer: ChunkWriter,
    progress: Progress | None,
) -> tuple[CaptureResult, Capture]:
    _warn_of_stray_hooks(store, dot)
    hooks = store.settings.hooks.get(f"{dot.namespace}/{dot.name}") or store.settings.hooks.get(
        dot.name
    )
    if not hooks:
        result = trees.capture(store, dot.dot, place, writer, progress)
        consistency = "best-effort" if result.unstable_paths else "unmoved"
        return result, ("read", consistency, 0)
    from dmsync.engine.hooks import hook_environment, quiesced  # slow to import, and rarely needed

    environment = hook_environment(dot=dot.name, branch=place.branch, tree=os.fsdecode(place.path))
    with quiesced(hooks, environment) as began:
        result = trees.capture(store, dot.dot, place, writer, progress)
        paused_us = int((time.monotonic() - began) * 1_000_000)
    return result, ("hooks", "quiesced", paused_us)


def _warn_of_stray_hooks(store: Store, dot: DotRow) -> None:
    """Hooks of a mistyped dot would never run, and nobody would notice. (A configuration may
    serve several stores, so a name that is merely unknown here is no mistake.)"""
    if not store.settings.hooks:
        return
    from difflib import get_close_matches

    dots = store.catalog.dots()
    known = {row.name for row in dots} | {f"{row.namespace}/{row.name}" for row in dots}
    for name in get_close_matches(dot.name, store.settings.hooks.keys() - known):
        store.say(f"the configuration has hooks for {name}: is {dot.name} meant?")


def _signature(request: CommitRequest, new: ObjectId) -> bytes | None:
    if request.signing is None:
        return None
    from dmsync.engine.signatures import sign  # slow to import, and rarely needed

    return sign(request.signing, Kind.COMMIT, new)


def _summary(
    new: ObjectId | None,
    parents: tuple[ObjectId, ...],
    branch: str,
    changes: TalliedChanges,
    result: CaptureResult,
    stored: int,
    facts: Capture,
    started: float,
) -> CommitSummary:
    return CommitSummary(
        commit=new,
        parents=parents,
        branch=branch,
        changes_count=changes.count,
        changes=changes.listed,
        files_scanned=result.statistics.files,
        bytes_scanned=result.statistics.bytes_scanned,
        bytes_stored=stored,
        capture=facts,
        elapsed_s=time.monotonic() - started,
        unstable_paths=list(result.unstable_paths),
        unreadable_paths=list(result.unreadable_paths),
    )


def _commit_value(
    store: Store,
    dot: DotRow,
    request: CommitRequest,
    metadata: tuple[tuple[str, str], ...],
    tip: ObjectId | None,
    parents: tuple[ObjectId, ...],
    root: Entry,
    changes: TalliedChanges,
) -> Commit:
    time_ns, offset_minutes = store.clock()
    before = None if tip is None else store.commit(dot.dot, tip)
    return Commit(
        root=root,
        parents=parents,
        author=request.author or store.settings.author,
        committer=store.settings.author,
        time_ns=time_ns,
        offset_minutes=offset_minutes,
        message=request.message,
        metadata=metadata,
        user_names=_names(before.user_names if before else (), changes.uids, _user),
        group_names=_names(before.group_names if before else (), changes.gids, _group),
    )


def _names(
    before: tuple[tuple[int, str], ...], ids: frozenset[int], name_of: Callable[[int], str]
) -> tuple[tuple[int, str], ...]:
    """The parent's table and the names that changed entries' ids have here, sorted by id.

    Ids that no file has any more may stay: finding out would cost a walk of the whole tree.
    """
    table = dict(before)
    for number in ids - table.keys():
        name = name_of(number)
        if name:
            table[number] = name
    return tuple(sorted(table.items()))


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except (KeyError, OverflowError):
        return ""


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except (KeyError, OverflowError):
        return ""


def _checked_metadata(request: CommitRequest) -> tuple[tuple[str, str], ...]:
    if not request.message.strip():
        raise UsageError("Please provide a commit message", hint='dm commit -m "MESSAGE"')
    if len(request.message.encode()) > MESSAGE_BYTES_MAX:
        raise UsageError("the commit message is longer than 1 MiB")
    pairs = dict(request.metadata)
    for key in pairs:
        if not key or not (key[0].islower() and key.isprintable()):
            raise UsageError(f"Metadata field names must start with lowercase characters: {key}")
        if key in METADATA_RESERVED:
            raise UsageError(f"metadata key {key} is reserved")
    if sum(len(k.encode()) + len(v.encode()) for k, v in pairs.items()) > METADATA_BYTES_MAX:
        raise UsageError("the metadata is longer than 64 KiB")
    return tuple(sorted(pairs.items()))
