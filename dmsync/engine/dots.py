"""Dots: make, choose, list, show, locate, rename, delete."""

import os

from dmsync.core.events import (
    CurrentDotSwitched,
    DotCreated,
    DotDeleted,
    DotRenamed,
    DotRestored,
    HeadSwitched,
    RefChanged,
    TreeAttached,
    TreeDetached,
    TreeSwitchStarted,
    UpstreamSet,
)
from dmsync.core.ids import DOT_ID_BYTES, DotId
from dmsync.core.names import check_dot_name, parse_dot_name
from dmsync.core.pages import directory_entries
from dmsync.core.values import plain_value_type
from dmsync.engine import switching, trees
from dmsync.engine.branches import BranchSummary, commit_count, list_branches
from dmsync.engine.dot_lookup import display_name, find_dot, find_written, resolve_dot
from dmsync.engine.progress import Progress
from dmsync.engine.store import Store
from dmsync.errors import (
    AlreadyExists,
    DotNotFound,
    NotFound,
    PathNotFound,
    RemoteNotFound,
    StorageFailed,
    UsageError,
)
from dmsync.storage.catalog import DotRow
from dmsync.storage.durable import fsync_directory, make_directory_durable, storage_errors

MASTER = "master"
ROOT_SUBDOT = "__root__"


@plain_value_type
class DotSummary:
    """One line of `dm list`. `dirty_bytes` is None where there is no working tree."""

    namespace: str
    name: str
    display_name: str
    id: DotId
    current: bool
    branch: str
    server: str
    containers: list[str]
    size_bytes: int
    commits: int
    dirty_bytes: int | None


@plain_value_type
class DotDetails:
    """All that `dm dot show` tells."""

    summary: DotSummary
    master_branch_id: str
    branches: list[BranchSummary]
    tree_path: bytes | None
    attached: bool
    upstreams: list[tuple[str, str]]
    hollow_commits: int = 0
    """Commits that are here by their record alone."""
    subdots: tuple[str, ...] | None = None
    """The subdots whose content is kept here; None: all."""
    collaborators: tuple[str, ...] = ()
    """Users who may read and write it on this store beside its owner."""


def init_dot(store: Store, name: str, *, at: str | None, as_root: bool) -> DotRow:
    """Make a dot with an unborn branch `master`, and make it the current one.

    With `at`, that existing directory becomes its subdot `__default__` (or, `as_root`, its whole
    tree); what it holds is the uncommitted content.

    Raises:
        AlreadyExists, InvalidName, UsageError (directory missing, inside the store, attached).
    """
    expression = parse_dot_name(name)
    if expression.branch is not None or expression.subdot is not None:
        raise UsageError(f'invalid dot name "{name}": a new dot has no branch or subdot yet')
    if as_root and at is None:
        raise UsageError("--as-root goes with --at DIR")
    namespace = expression.namespace or store.settings.namespace
    check_dot_name(expression.dot)
    finish_deletions(store)
    dot = DotId(os.urandom(DOT_ID_BYTES))
    attached = None if at is None else _attachable(store, dot, at, as_root)
    store.layout.make_dot_dirs(dot)
    with store.transaction("init") as tx:
        if store.catalog.dot_by_name(namespace, expression.dot) is not None:
            written = display_name(store, namespace, expression.dot)
            raise AlreadyExists(f"{written} exists already")
        tx.append(DotCreated(dot, namespace, expression.dot, store.settings.actor))
        if attached is not None:
            tx.append(attached)
        tx.append(CurrentDotSwitched(dot))
    row = store.catalog.dot(dot)
    assert row is not None, "the transaction just created it"
    if attached is None:
        switching.make_place(store, dot, MASTER, None)
    return row


def _attachable(store: Store, dot: DotId, at: str, as_root: bool) -> TreeAttached:
    path = os.path.realpath(at)
    if not os.path.isdir(path):
        raise UsageError(f"{at} is not a directory", hint="make it first")
    refuse_overlap(at, store.home)
    refuse_attached(store, at)
    found = os.stat(path)
    return TreeAttached(dot, os.fsencode(path), as_root, found.st_dev, found.st_ino)


def refuse_overlap(at: str, home: str) -> None:
    """Raises UsageError: the directory holds the store or lies in it (which need not exist)."""
    path, home = os.path.realpath(at), os.path.realpath(home)
    if path == home or path.startswith(home + os.sep) or home.startswith(path.rstrip("/") + os.sep):
        raise UsageError(f"{at} and the store {home} lie within one another")


def refuse_attached(store: Store, at: str) -> None:
    """Raises UsageError: the directory `at`, which exists, is the tree of a dot."""
    found = os.stat(at)
    for row in store.catalog.dots():
        if _is_tree_of(store, row.dot, found):
            raise UsageError(f"{at} is attached to the dot {row.name} already")


def _is_tree_of(store: Store, dot: DotId, found: os.stat_result) -> bool:
    tree = store.catalog.tree(dot)
    return tree is not None and (tree.device, tree.inode) == (found.st_dev, found.st_ino)


def refuse_target(store: Store, at: str, dot: DotId | None) -> None:
    """Refuse a directory that a clone cannot be written into: it may be missing, or be empty.

    `dot`: whose tree it may be already, from a clone that was run before.

    Raises:
        UsageError: no directory, not empty, overlapping the store, attached.
    """
    refuse_overlap(at, store.home)
    if not os.path.lexists(at):
        return
    if not os.path.isdir(at):
        raise UsageError(f"{at} is not a directory")
    if dot is not None and _is_tree_of(store, dot, os.stat(at)):
        return
    refuse_attached(store, at)
    try:
        is_empty = not os.listdir(at)
    except OSError as exc:
        raise UsageError(f"cannot read {at}: {exc.strerror}") from exc
    if not is_empty:
        raise UsageError(f"{at} is not empty", hint="give a new or an empty directory")


def attach_dot(
    store: Store, row: DotRow, *, at: str, as_root: bool, progress: Progress | None = None
) -> bytes:
    """Make the directory `at` the tree of a dot that has none, and write its branch out there.

    Journaled like every switch: a kill leaves no attachment or one that the next command
    completes. Returns the directory's path.

    Raises:
        UsageError: see refuse_target; the dot has a tree elsewhere, or subdots that `at` cannot
            be without `as_root`. StorageFailed: the directory cannot be made.
    """
    with switching.ready(store, row.dot, progress):
        refuse_target(store, at, row.dot)
        tree = store.catalog.tree(row.dot)
        if tree is not None and os.path.isdir(at) and _is_tree_of(store, row.dot, os.stat(at)):
            return tree.path
        _refuse_other_tree(store, row)
        if not as_root:
            _refuse_subdots(store, row.dot)
        _make_directory(at)
        branch = store.catalog.head(row.dot)
        tip = trees.branch_tip(store, row.dot, branch)
        attached = _attachable(store, row.dot, at, as_root)
        with store.transaction("clone") as tx:
            tx.append(attached)
            if tip is not None:
                tx.append(TreeSwitchStarted(row.dot, branch, None, tip, "clone"))
        if tip is not None:
            switching.switch_tree(
                store,
                row.dot,
                branch=branch,
                target=tip,
                events=(),
                command="clone",
                progress=progress,
            )
        return attached.path


def _refuse_other_tree(store: Store, row: DotRow) -> None:
    tree = store.catalog.tree(row.dot)
    if tree is not None:
        raise UsageError(f"{row.name} is attached to {os.fsdecode(tree.path)} already")
    trees_dir = os.path.dirname(store.layout.tree_dir(row.dot, MASTER))
    if os.path.isdir(trees_dir) and os.listdir(trees_dir):
        raise UsageError(
            f"{row.name} has working trees in the store already",
            hint="dm dot path prints where",
        )


def _refuse_subdots(store: Store, dot: DotId) -> None:
    """A directory that stands for one subdot cannot hold another one that is kept here."""
    scope = store.scope(dot)
    for branch in store.catalog.branches(dot):
        root = store.root(dot, branch.target)
        for entry in directory_entries(store.objects(dot), root.tree):
            is_kept = scope is None or entry.name in scope
            if is_kept and entry.name != trees.DEFAULT_SUBDOT:
                raise UsageError(
                    f"branch {branch.short_name} has the subdot {os.fsdecode(entry.name)}: "
                    f"the directory of --at is {os.fsdecode(trees.DEFAULT_SUBDOT)} alone",
                    hint="--as-root makes it the whole tree (the commits are here already)",
                )


def _make_directory(path: str) -> None:
    """Make a missing directory for its owner alone: a commit's own mode is given to it later."""
    if os.path.isdir(path):
        return
    try:
        os.makedirs(path, 0o700)
    except OSError as exc:
        raise StorageFailed(f"cannot make {path}: {exc.strerror}") from exc


def switch_dot(store: Store, name: str) -> DotRow:
    """Make a dot the current one. Writes nothing when it is already."""
    row = find_dot(store, name)
    if store.catalog.current_dot() != row.dot:
        with store.transaction("switch") as tx:
            tx.append(CurrentDotSwitched(row.dot))
    return row


def list_dots(store: Store) -> list[DotSummary]:
    """All dots, by displayed name."""
    summaries = [_summary(store, row) for row in store.catalog.dots()]
    return sorted(summaries, key=lambda summary: summary.display_name)


def _summary(store: Store, row: DotRow) -> DotSummary:
    report = trees.status(store, row.dot)
    tip = report.head
    return DotSummary(
        namespace=row.namespace,
        name=row.name,
        display_name=display_name(store, row.namespace, row.name),
        id=row.dot,
        current=store.catalog.current_dot() == row.dot,
        branch=report.branch,
        server=os.uname().nodename,
        containers=[],
        size_bytes=store.objects(row.dot).stored_bytes(),
        commits=0 if tip is None else commit_count(store, row.dot, tip),
        dirty_bytes=report.dirty_bytes if report.materialised else None,
    )


def show_dot(store: Store, name: str | None) -> DotDetails:
    row = resolve_dot(store, name)
    summary = _summary(store, row)
    place = trees.place_of(store, row.dot, summary.branch)
    upstreams = [
        (remote, display_name(store, namespace, dot))
        for remote, namespace, dot in store.catalog.upstreams(row.dot)
    ]
    return DotDetails(
        summary=summary,
        master_branch_id=row.dot.hex(),
        branches=list_branches(store, row, count=True),
        tree_path=None if place is None else place.path,
        attached=place is not None and place.attached,
        upstreams=upstreams,
        hollow_commits=len(store.catalog.hollow_commits(row.dot)),
        subdots=store.catalog.scope(row.dot),
        collaborators=tuple(store.catalog.collaborators(row.dot)),
    )


def dot_path(store: Store, text: str | None) -> bytes:
    """The directory to mount or write into, made when needed.

    `DOT[@BRANCH][.SUBDOT]`: default subdot `__default__`, whole tree `__root__`.

    Raises:
        DotNotFound: no such dot or branch. PathNotFound: no such subdot in an attached directory,
            which is the user's: nothing is made there; or a partial clone does not keep it.
    """
    expression = None if text is None else parse_dot_name(text)
    row = resolve_dot(store, None) if expression is None else find_written(store, expression)
    head = store.catalog.head(row.dot)
    branch = (expression.branch if expression else None) or head
    subdot = (expression.subdot if expression else None) or "__default__"
    if branch != head and store.catalog.branch(row.dot, branch) is None:
        raise DotNotFound(f"Branch does not exist: {branch}")
    kept = store.scope(row.dot)
    if kept is not None and subdot != ROOT_SUBDOT and os.fsencode(subdot) not in kept:
        named = sorted(os.fsdecode(name) for name in kept)
        raise PathNotFound(
            f"subdot {subdot} is not one of those kept here: {', '.join(named)}",
            hint=f"dm dot path {row.name}.{named[0] if named else ROOT_SUBDOT}",
        )
    place = _ready_place(store, row.dot, branch)
    if place.subdot is not None:
        if subdot != "__default__":
            raise UsageError("a dot attached with --at has the subdot __default__ only")
        return place.path
    if subdot == ROOT_SUBDOT:
        return place.path
    path = os.path.join(place.path, os.fsencode(subdot))
    if not os.path.isdir(path):
        if place.attached:
            raise PathNotFound(
                f"no subdot {subdot} in {os.fsdecode(place.path)}",
                hint=f"dm dot path {row.name}.{ROOT_SUBDOT} is the whole directory",
            )
        _make_subdot(path)
    return path


def _ready_place(store: Store, dot: DotId, branch: str) -> trees.TreePlace:
    """The tree of `branch`, made when needed. On a read-only filesystem no lock can be had and
    nothing made, but a tree that is there and whole can be named."""
    try:
        with switching.ready(store, dot):
            return switching.make_place(store, dot, branch, None)
    except StorageFailed:
        place = trees.place_of(store, dot, branch)
        if place is None or switching.pending_switch(store, dot, branch) is not None:
            raise
        return place


def _make_subdot(path: bytes) -> None:
    try:
        os.mkdir(path, 0o755)
    except FileExistsError:
        return
    except OSError as exc:
        raise StorageFailed(f"cannot make {os.fsdecode(path)}: {exc.strerror}") from exc


def rename_dot(store: Store, old: str, new: str) -> None:
    """Rename a dot; its id, history and upstreams stay."""
    row = find_dot(store, old)
    expression = parse_dot_name(new)
    if expression.branch is not None or expression.subdot is not None:
        raise UsageError(f'invalid dot name "{new}"')
    namespace = expression.namespace or row.namespace
    with store.transaction("rename") as tx:
        if store.catalog.dot_by_name(namespace, expression.dot) is not None:
            raise AlreadyExists(f"{new} exists already")
        tx.append(DotRenamed(row.dot, namespace, expression.dot))


def set_upstream(store: Store, dot: str | None, remote: str, remote_dot: str) -> None:
    """Remember under which name `remote` knows this dot; it need not exist there yet."""
    row = resolve_dot(store, dot)
    if store.catalog.remote(remote) is None:
        raise RemoteNotFound(f"Unable to find remote '{remote}'", hint="dm remote -v lists them")
    expression = parse_dot_name(remote_dot)
    with store.transaction("set-upstream") as tx:
        tx.append(UpstreamSet(row.dot, remote, expression.namespace or "", expression.dot))


def delete_dot(store: Store, name: str) -> DotRow:
    """Delete a dot: its name is free at once, its data goes to the trash until the grace is over.

    A managed tree goes with it as it is, uncommitted changes included; an attached directory is
    left untouched.
    """
    row = find_dot(store, name)
    with store.dot_locked(row.dot):
        with store.transaction("delete") as tx:
            tx.append(DotDeleted(row.dot, new_trash(row.dot)))
        finish_deletions(store)
    return row


def new_trash(dot: DotId) -> str:
    """A new name for a deleted dot's directory in the trash."""
    return f"{dot.hex()}-{os.urandom(4).hex()}"


def finish_deletions(store: Store) -> None:
    """Move the directories of deleted dots to the trash; completes what a kill interrupted."""
    make_directory_durable(store.layout.trash_dir)
    for row in store.catalog.dots(include_deleted=True):
        if row.trash is None:
            continue
        source = store.layout.dot_dir(row.dot)
        target = store.layout.trashed_dot_dir(row.trash)
        if os.path.isdir(source) and not os.path.exists(target):
            store.forget_objects(row.dot)
            with storage_errors(f"moving {source} to the trash"):
                os.rename(source, target)
            fsync_directory(store.layout.trash_dir)


def bring_back_directory(store: Store, dot: DotId, trash: str) -> None:
    """Move a deleted dot's directory out of the trash, whole: packs, trees, caches.

    Comes before DotRestored is recorded: after a kill in between, finish_deletions moves it to the
    trash again. `trash` is where its deletion put it; when it came and went again since, packs lie
    in the newer one and the trees are taken from both.

    Raises:
        NotFound: the trash has been emptied. AlreadyExists: the dot's place is taken.
    """
    row = store.catalog.dot(dot)
    newest = trash if row is None or row.trash is None else row.trash
    source, target = store.layout.trashed_dot_dir(newest), store.layout.dot_dir(dot)
    if os.path.isdir(source):
        store.forget_objects(dot)
        _remove_skeleton(store, dot)
        with storage_errors(f"moving {source} out of the trash"):
            os.rename(source, target)
        fsync_directory(store.layout.dots_dir)
    elif not os.path.isdir(target):
        raise NotFound("the dot's data is gone: the trash has been emptied", dot=dot.hex())
    if newest != trash:
        _take_back_trees(store, dot, trash)


def _remove_skeleton(store: Store, dot: DotId) -> None:
    """Remove the empty directories that looking for a deleted dot's objects has made."""
    target = store.layout.dot_dir(dot)
    if not os.path.isdir(target):
        return
    for directory in (store.layout.packs_dir(dot), store.layout.trees_dir(dot)):
        if os.path.isdir(directory) and os.listdir(directory):
            raise AlreadyExists(f"{target} holds data already", dot=dot.hex())
    from shutil import rmtree  # slow to import, and rarely needed

    rmtree(target)


def _take_back_trees(store: Store, dot: DotId, trash: str) -> None:
    source = os.path.join(store.layout.trashed_dot_dir(trash), "trees")
    if not os.path.isdir(source):
        return
    for name in os.listdir(source):
        if not os.path.lexists(store.layout.tree_dir(dot, name)):
            with storage_errors(f"moving the tree {name} out of the trash"):
                os.rename(os.path.join(source, name), store.layout.tree_dir(dot, name))
    fsync_directory(store.layout.trees_dir(dot))


def revive_dot(store: Store, dot: DotId, namespace: str, name: str, actor: str) -> None:
    """Let a deleted dot come again (by push or clone) as a bare one without refs.

    Its commits are known again, so that only what is new must be sent; its old refs stay in the
    reflog, its old trees in the trash. Raises AlreadyExists when the name is taken.
    """
    row = store.catalog.dot(dot)
    assert row is not None and row.trash is not None, "only a deleted dot is revived"
    finish_deletions(store)
    store.forget_objects(dot)
    store.layout.make_dot_dirs(dot)
    _take_back_packs(store, dot, row.trash)
    with store.catalog.transaction("revive", actor) as tx:
        if store.catalog.dot_by_name(namespace, name) is not None:
            raise AlreadyExists(f"{display_name(store, namespace, name)} exists already")
        tx.append(DotRestored(dot, namespace, name))
        for ref in store.catalog.refs(dot):
            tx.append(RefChanged(dot, ref.name, ref.target, None, "delete", "the dot was deleted"))
        if store.catalog.tree(dot) is not None:
            tx.append(TreeDetached(dot))
        tx.append(HeadSwitched(dot, MASTER))


def _take_back_packs(store: Store, dot: DotId, trash: str) -> None:
    """Move sealed packs out of the trash; may be repeated after a kill."""
    source = os.path.join(store.layout.trashed_dot_dir(trash), "packs")
    if not os.path.isdir(source):
        return
    target = store.layout.packs_dir(dot)
    for name in os.listdir(source):
        with storage_errors(f"moving {name} out of the trash"):
            os.rename(os.path.join(source, name), os.path.join(target, name))
    fsync_directory(target)
