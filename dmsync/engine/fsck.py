"""fsck: is everything that a ref can name here, whole, and what it was when it was stored?

Trusts no projection: the log's chain is verified, the catalog compared with one folded anew, every
pack checked, and the closure of every ref walked page by page. Changes nothing.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import accumulate

from dmsync.core.graph import ancestors_difference
from dmsync.core.ids import Kind, ObjectId
from dmsync.core.objects import tag_from_bytes
from dmsync.engine.closure_walk import Closure
from dmsync.engine.materialise import private_directory
from dmsync.engine.progress import SILENT, Progress
from dmsync.engine.repairing.losses import read_losses
from dmsync.engine.store import Store
from dmsync.errors import (
    Corruption,
    DmError,
    RevisionNotFound,
    StorageFailed,
    StorageFull,
)
from dmsync.storage.catalog import Catalog, DotRow, RefRow
from dmsync.storage.durable import storage_errors
from dmsync.storage.event_log import EventLog
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.stages import stage

COMPARISONS_MAX = 3
"""Times the fold is repeated when somebody appends to the log meanwhile."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong. `dot` is a name, or "" for the store itself; `where` names a file, ref or
    object; `commits` are those that cannot be trusted because of it (hex, newest first), `paths`
    files and directories of the newest of them that hold it."""

    dot: str
    where: str
    message: str
    commits: tuple[str, ...] = ()
    paths: tuple[str, ...] = ()


@dataclass
class FsckReport:
    """What was looked at and what is wrong. `notes` are worth knowing but harm nothing."""

    full: bool
    problems: list[Problem] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    packs: int = 0
    records: int = 0
    commits: int = 0
    hollow_commits: int = 0
    """Of the commits: those known by their record alone, which is all that was checked of them."""
    pages: int = 0
    chunks: int = 0
    bytes_checked: int = 0


def fsck(
    store: Store,
    dots: Iterable[DotRow] | None = None,
    *,
    full: bool,
    progress: Progress = SILENT,
) -> FsckReport:
    """Check the store, or only some dots of it. `full` also decodes and hashes every record, and
    computes each file's content id again.

    Returns the report; damage is never raised. Needs no lock: packs are immutable and what is
    added meanwhile is complete when it can be seen.
    """
    report = FsckReport(full)
    if dots is None:
        _check_store(store, report, progress)
    _tell_losses(store, report)
    for dot in store.catalog.dots() if dots is None else dots:
        with stage("verify"):
            _check_packs(store.objects(dot.dot), dot, report, progress)
            _check_closure(store, store.objects(dot.dot), dot, report, progress)
        _check_tree(store, dot, report)
    for dot, path in trashed_dots(store) if dots is None else ():
        with stage("verify"), opened_trash(path, dot) as objects:
            _check_packs(objects, dot, report, progress)
            _check_closure(store, objects, dot, report, progress)
    return report


def _tell_losses(store: Store, report: FsckReport) -> None:
    """What a repair could not put back stays a problem until somebody accepts it."""
    for loss in read_losses(store.layout):
        message = f"lost: {loss.why} (to accept that: dm fsck --repair --accept-loss)"
        commits = (loss.commit,) if loss.commit else ()
        report.problems.append(Problem(loss.name, loss.where, message, commits))


def trashed_dots(store: Store) -> Iterator[tuple[DotRow, str]]:
    """Deleted dots that can come back, called by where they lie, and their directories."""
    for dot in store.catalog.dots(include_deleted=True):
        if dot.trash is not None:
            path = store.layout.trashed_dot_dir(dot.trash)
            if os.path.isdir(path):
                yield replace(dot, name=f"trash/{dot.trash}"), path


@contextmanager
def opened_trash(path: str, dot: DotRow) -> Iterator[ObjectStore]:
    """The objects of a dot in the trash."""
    with ObjectStore(path) as objects:
        objects.dot_id = dot.dot
        yield objects


def _check_store(store: Store, report: FsckReport, progress: Progress) -> None:
    progress.phase("reading the event log")
    _record(report, "", "format", lambda: store.layout.read_format())
    with stage("verify"):
        _record(report, "", "events", lambda: _verify_log(store, report))
    progress.phase("folding the event log")
    with stage("catalog"):
        _record(report, "", "catalog.sqlite", lambda: compare_projection(store, report))
    known = {dot.dot.hex() for dot in store.catalog.dots(include_deleted=True)}
    try:
        found = sorted(os.listdir(store.layout.dots_dir))
    except FileNotFoundError:
        found = []
    for name in found:
        if name not in known:
            report.notes.append(
                f"dots/{name} belongs to no dot (an init or clone that was cut); a clone goes on "
                f"with the {_received_bytes(store, name)} bytes it holds, or remove it"
            )


def _received_bytes(store: Store, name: str) -> int:
    """Bytes in packs and quarantine of a directory in `dots`."""
    paths = (os.path.join(store.layout.dots_dir, name, part) for part in ("packs", "quarantine"))
    return sum(
        entry.stat(follow_symlinks=False).st_size
        for path in paths
        if os.path.isdir(path)
        for entry in os.scandir(path)
    )


def _record(report: FsckReport, dot: str, where: str, check: Callable[[], object]) -> None:
    """Run one check; what it raises becomes a problem, but for a full disk: that is no damage."""
    try:
        check()
    except StorageFull:
        raise
    except DmError as error:
        report.problems.append(Problem(dot, where, error.message))


def _verify_log(store: Store, report: FsckReport) -> None:
    """Read the whole log: each record's checksum and its place in the chain.

    That the log lost its end cannot be seen from the log: a writer noticed it and noted it. It
    stays a problem until a repair acknowledges it.
    """
    log = EventLog(store.layout.events_dir)
    for lost in log.lost_end():
        message = f"{lost} (to confirm that you know: dm fsck --repair)"
        report.problems.append(Problem("", "events", message))
    for _ in log.read():
        pass


def compare_projection(store: Store, report: FsckReport) -> None:
    """The catalog must be what folding the log anew gives, table by table, and find it again by
    its indexes."""
    for contradiction in store.catalog.contradictions():
        report.problems.append(Problem("", "catalog.sqlite", contradiction))
    for _ in range(COMPARISONS_MAX):
        fresh_seq, fresh = _fold_anew(store)
        store.catalog.refresh()
        if store.catalog.last_seq() == fresh_seq:
            found = store.catalog.digest()
            for table in sorted({*found, *fresh}):
                if found.get(table) != fresh.get(table):
                    message = f"table {table} is not what the event log says"
                    report.problems.append(Problem("", "catalog.sqlite", message))
            return
    report.notes.append("the catalog was not compared with the log: others keep writing")


def _fold_anew(store: Store) -> tuple[int, dict[str, str]]:
    """(last sequence number, digest) of a catalog built beside the store's own, or in the
    system's temporary directory when there is no room or no writing."""
    try:
        with private_directory(store.layout) as scratch:
            return _fold_in(scratch, store)
    except (StorageFull, StorageFailed):
        with storage_errors("making a temporary directory"):
            directory = tempfile.TemporaryDirectory(prefix="dmsync-fsck-")
        with directory as scratch:
            return _fold_in(scratch, store)


def _fold_in(directory: str, store: Store) -> tuple[int, dict[str, str]]:
    path = os.path.join(directory, "catalog.sqlite")
    with Catalog.folded_at(path, store.layout, store.read_commit) as fresh:
        return fresh.last_seq(), fresh.digest()


# --- packs -----------------------------------------------------


def _check_packs(objects: ObjectStore, dot: DotRow, report: FsckReport, progress: Progress) -> None:
    packs = objects.packs()
    bytes_total = sum(pack.bytes for pack in packs)
    report.packs += len(packs)
    report.records += sum(pack.records for pack in packs)
    report.bytes_checked += bytes_total
    progress.phase(
        f"checking packs of {dot.name}", bytes_total=bytes_total if report.full else None
    )
    sizes = {pack.name: pack.bytes for pack in sorted(packs, key=lambda pack: pack.name)}
    before = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))

    def checked(pack: str, done: int) -> None:
        progress.reached(before.get(pack, 0) + done if report.full else 0)

    for problem in objects.check(full=report.full, checked=checked):
        where = problem.pack if problem.offset is None else f"{problem.pack} at {problem.offset}"
        report.problems.append(Problem(dot.name, where, problem.message))


# --- closures -----------------------------------------------------


def _check_closure(
    store: Store, objects: ObjectStore, dot: DotRow, report: FsckReport, progress: Progress
) -> None:
    """Every commit that a ref or a stored working state names, with all it holds; of hollow ones
    the record, and of all only the subdots that are kept here."""
    subdots = store.catalog.scope(dot.dot)
    progress.phase(f"walking trees of {dot.name}")
    closure = Closure(
        objects,
        full=report.full,
        progress=progress,
        scope=None if subdots is None else frozenset(name.encode() for name in subdots),
    )
    damaged: dict[ObjectId, list[ObjectId]] = {}
    hollow = 0
    for commit in _commits(store, objects, dot, report):
        report.commits += 1
        row = store.catalog.commit(dot.dot, commit)
        is_hollow = row is not None and row.is_hollow
        hollow += is_hollow
        payload = None if row is None else row.payload
        for bad in closure.damage_of_commit(commit, payload, is_hollow=is_hollow):
            damaged.setdefault(bad, []).append(commit)
    report.hollow_commits += hollow
    if hollow:
        report.notes.append(f"{dot.name}: {hollow} commits are here by their record alone")
    if subdots is not None:
        report.notes.append(f"{dot.name}: only these subdots are kept here: {', '.join(subdots)}")
    for bad, commits in damaged.items():
        report.problems.append(
            Problem(
                dot.name,
                bad.hex(),
                closure.reasons[bad],
                tuple(commit.hex() for commit in reversed(commits)),
                tuple(map(_shown, closure.paths_of(bad, commits[-1]))),
            )
        )
    report.pages += closure.pages_count
    report.chunks += closure.chunks


def _shown(path: bytes) -> str:
    return path.decode("utf-8", "backslashreplace")


@dataclass
class Harm:
    """What of a dot cannot be read: objects by id, and the commits that need them, parents
    first. `reasons` are for people, `paths` as of a Problem."""

    objects: dict[ObjectId, Kind] = field(default_factory=dict)
    commits: list[ObjectId] = field(default_factory=list)
    reasons: dict[ObjectId, str] = field(default_factory=dict)
    paths: dict[ObjectId, list[tuple[ObjectId, bytes]]] = field(default_factory=dict)
    """Where an object is: (commit, path) of the newest commit that needs it."""

    def __bool__(self) -> bool:
        return bool(self.objects)


def find_harm(
    store: Store, objects: ObjectStore, dot: DotRow, *, progress: Progress = SILENT
) -> Harm:
    """Read everything that refs and stored working states of the dot name, and tell what of it
    is not here or not sound. Commits that the catalog could not take in come first."""
    harm = Harm()
    for commit in store.catalog.missing_commits(dot.dot):
        if not objects.has(Kind.COMMIT, commit):
            harm.objects[commit] = Kind.COMMIT
            harm.commits.append(commit)
            harm.reasons[commit] = f"commit {commit.hex()[:12]} is not in this dot"
    for ref in store.catalog.refs(dot.dot, "tag/"):
        is_commit = store.catalog.has_commit(dot.dot, ref.target)
        is_told = is_commit or ref.target in harm.objects
        if not is_told and not objects.has(Kind.TAG, ref.target):
            harm.objects[ref.target] = Kind.TAG
            harm.reasons[ref.target] = f"{ref.name}: its tag object is not in this dot"
    subdots = store.catalog.scope(dot.dot)
    scope = None if subdots is None else frozenset(name.encode() for name in subdots)
    progress.phase(f"walking trees of {dot.name}")
    closure = Closure(objects, full=True, progress=progress, scope=scope)
    for commit in _commits(store, objects, dot, FsckReport(full=True)):
        row = store.catalog.commit(dot.dot, commit)
        is_hollow = row is not None and row.is_hollow
        payload = None if row is None else row.payload
        found = closure.damage_of_commit(commit, payload, is_hollow=is_hollow)
        if found and commit not in harm.objects:
            harm.commits.append(commit)
        for bad in found:
            if bad in closure.kinds:
                harm.objects.setdefault(bad, closure.kinds[bad])
                harm.reasons.setdefault(bad, closure.reasons[bad])
                harm.paths[bad] = [(commit, path) for path in closure.paths_of(bad, commit)]
    return harm


def _commits(
    store: Store, objects: ObjectStore, dot: DotRow, report: FsckReport
) -> Iterator[ObjectId]:
    """Each commit once, parents first; a ref whose commit is unknown is a problem."""
    tips: dict[ObjectId, None] = {}
    snapshots: dict[ObjectId, None] = {}
    for ref in store.catalog.refs(dot.dot):
        try:
            tips[_commit_at(store, objects, dot, ref)] = None
        except DmError as error:
            report.problems.append(Problem(dot.name, ref.name, error.message))
    for row in store.catalog.working_snapshots(dot.dot):
        snapshots[row.commit] = None
    for missing in store.catalog.missing_commits(dot.dot):
        message = f"commit {missing.hex()[:12]} is named by the event log and is not here"
        report.problems.append(Problem(dot.name, "history", message, (missing.hex(),)))
    try:
        yield from ancestors_difference(store.catalog.graph(dot.dot), list(tips), [])
    except DmError as gap:
        report.problems.append(Problem(dot.name, "history", gap.message))
    yield from (saved for saved in snapshots if saved not in tips)


def _commit_at(store: Store, objects: ObjectStore, dot: DotRow, ref: RefRow) -> ObjectId:
    """The commit a ref names, by way of its tag object when it is an annotated tag.

    Raises:
        RevisionNotFound: no such commit. ObjectMissing, Corruption: the tag object is not here,
            not sound, or another tag's.
    """
    commit = ref.target
    if ref.name.startswith("tag/") and not store.catalog.has_commit(dot.dot, commit):
        tag = tag_from_bytes(objects.read(Kind.TAG, commit))
        if tag.name != ref.short_name:
            raise Corruption(f"names the tag object of {tag.name}")
        commit = tag.target
    if not store.catalog.has_commit(dot.dot, commit):
        raise RevisionNotFound(f"names the unknown commit {commit.hex()}")
    return commit


# --- trees -----------------------------------------------------


def _check_tree(store: Store, dot: DotRow, report: FsckReport) -> None:
    """A directory that moved or a switch that was cut harms nothing stored; it is told."""
    if store.catalog.switches(dot.dot):
        report.notes.append(
            f"{dot.name}: a switch of its tree was cut; the next command finishes it"
        )
    tree = store.catalog.tree(dot.dot)
    if tree is None:
        return
    try:
        found = os.stat(tree.path)
    except OSError as exc:
        report.notes.append(f"{dot.name}: {os.fsdecode(tree.path)}: {exc.strerror}")
        return
    if (found.st_dev, found.st_ino) != (tree.device, tree.inode):
        report.notes.append(f"{dot.name}: {os.fsdecode(tree.path)} is another directory now")
