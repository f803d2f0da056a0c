"""fsck: is everything that a ref can name here, whole, and what it was when it was stored?

Trusts no projection: the log's chain is verified, the catalog compared with one folded anew, every
pack checked, and the closure of every ref walked page by page. Changes nothing.
"""

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import accumulate

from dmsync.core.graph import ancestors_difference
from dmsync.core.ids import Kind, ObjectId, object_id
from dmsync.core.objects import Entry, EntryKind, commit_from_bytes, tag_from_bytes
from dmsync.core.objects import Layout as FileLayout
from dmsync.core.pages import DIRECTORY, MANIFEST, ZERO_RUN, Page, Span, read_page
from dmsync.engine.file_content import check_content
from dmsync.engine.materialise import private_directory
from dmsync.engine.progress import SILENT, Progress
from dmsync.engine.store import Store
from dmsync.errors import (
    BadObject,
    ContentAbsent,
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

DAMAGE_NAMED_MAX = 64
"""Damaged objects told apart below one page; with more, only the first ones name their commits."""
COMPARISONS_MAX = 3
"""Times the fold is repeated when somebody appends to the log meanwhile."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong. `dot` is a name, or "" for the store itself; `where` names a file, ref or
    object; `commits` are those that cannot be trusted because of it (hex, newest first)."""

    dot: str
    where: str
    message: str
    commits: tuple[str, ...] = ()


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
    for dot in store.catalog.dots() if dots is None else dots:
        with stage("verify"):
            _check_packs(store, dot, report, progress)
            _check_closure(store, dot, report, progress)
        _check_tree(store, dot, report)
    return report


def _check_store(store: Store, report: FsckReport, progress: Progress) -> None:
    progress.phase("reading the event log")
    _record(report, "", "format", lambda: store.layout.read_format())
    with stage("verify"):
        _record(report, "", "events", lambda: _verify_log(store, report))
    progress.phase("folding the event log")
    with stage("catalog"):
        _record(report, "", "catalog.sqlite", lambda: _compare_projection(store, report))
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
    stays a problem until somebody removes the note.
    """
    log = EventLog(store.layout.events_dir)
    for lost in log.lost_end():
        message = f"{lost} (to confirm that you know, remove events/lost-end)"
        report.problems.append(Problem("", "events", message))
    for _ in log.read():
        pass


def _compare_projection(store: Store, report: FsckReport) -> None:
    """The catalog must be what folding the log anew gives, table by table."""
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


def _check_packs(store: Store, dot: DotRow, report: FsckReport, progress: Progress) -> None:
    objects = store.objects(dot.dot)
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


def _check_closure(store: Store, dot: DotRow, report: FsckReport, progress: Progress) -> None:
    """Every commit that a ref or a stored working state names, with all it holds; of hollow ones
    the record, and of all only the subdots that are kept here."""
    subdots = store.catalog.scope(dot.dot)
    progress.phase(f"walking trees of {dot.name}")
    closure = _Closure(
        store.objects(dot.dot),
        full=report.full,
        progress=progress,
        scope=None if subdots is None else frozenset(name.encode() for name in subdots),
    )
    damaged: dict[ObjectId, list[ObjectId]] = {}
    hollow = 0
    for commit in _commits(store, dot, report):
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
            )
        )
    report.pages += closure.pages_count
    report.chunks += closure.chunks


def _commits(store: Store, dot: DotRow, report: FsckReport) -> Iterator[ObjectId]:
    """Each commit once, parents first; a ref whose commit is unknown is a problem."""
    tips: dict[ObjectId, None] = {}
    snapshots: dict[ObjectId, None] = {}
    for ref in store.catalog.refs(dot.dot):
        try:
            tips[_commit_at(store, dot, ref)] = None
        except DmError as error:
            report.problems.append(Problem(dot.name, ref.name, error.message))
    for row in store.catalog.working_snapshots(dot.dot):
        snapshots[row.commit] = None
    try:
        yield from ancestors_difference(store.catalog.graph(dot.dot), list(tips), [])
    except RevisionNotFound as gap:
        report.problems.append(Problem(dot.name, "history", gap.message))
    yield from (saved for saved in snapshots if saved not in tips)


def _commit_at(store: Store, dot: DotRow, ref: RefRow) -> ObjectId:
    """The commit a ref names, by way of its tag object when it is an annotated tag.

    Raises:
        RevisionNotFound: no such commit. ObjectMissing, Corruption: the tag object is not here,
            not sound, or another tag's.
    """
    commit = ref.target
    if ref.name.startswith("tag/") and not store.catalog.has_commit(dot.dot, commit):
        tag = tag_from_bytes(store.read_tag(dot.dot, commit))
        if tag.name != ref.short_name:
            raise Corruption(f"names the tag object of {tag.name}")
        commit = tag.target
    if not store.catalog.has_commit(dot.dot, commit):
        raise RevisionNotFound(f"names the unknown commit {commit.hex()}")
    return commit


FileKey = tuple[FileLayout, ObjectId | None, int, bytes]
"""Equal ones need one check: layout, manifest, size, content id."""
_NONE: frozenset[ObjectId] = frozenset()


class _Closure:
    """Walks trees; each page once. Remembers only pages below which something is damaged."""

    def __init__(
        self,
        objects: ObjectStore,
        *,
        full: bool,
        progress: Progress,
        scope: frozenset[bytes] | None = None,
    ) -> None:
        self.pages: set[ObjectId] = set()
        self._roots: set[ObjectId] = set()
        """Pages of roots of which only the entries in `scope` were walked."""
        self._scope = scope
        self.chunks = 0
        self.reasons: dict[ObjectId, str] = {}
        self._objects = objects
        self._full = full
        self._progress = progress
        self._damage: dict[ObjectId, frozenset[ObjectId]] = {}
        self._chunk_bytes: dict[ObjectId, int] = {}
        """Length of every chunk that was read."""
        self._bytes_read = 0
        self._files: dict[FileKey, str] = {}
        """What is wrong with each file that was checked, or "" for nothing."""

    def damage_of_commit(
        self, commit: ObjectId, payload: bytes | None, *, is_hollow: bool = False
    ) -> frozenset[ObjectId]:
        """What is missing or harmed of a commit: itself, pages, chunks."""
        try:
            stored = self._objects.read_commit(commit)
            if payload is not None and object_id(Kind.COMMIT, payload) != commit:
                raise Corruption("the commit's row in the catalog is not the commit")
            root = commit_from_bytes(stored, trusted=True).root
        except DmError as error:
            self.reasons[commit] = error.message
            return frozenset((commit,))
        return _NONE if is_hollow else self._damage_of_tree(root)

    @property
    def pages_count(self) -> int:
        return len(self.pages | self._roots)

    def _damage_of_tree(self, root: Entry) -> frozenset[ObjectId]:
        if root.tree is None:
            return _NONE
        self._walk(root.tree)
        return self._damage.get(root.tree, _NONE)

    def _walk(self, root: ObjectId) -> None:
        """Depth first without recursion: a hostile tree may be deep."""
        stack = [_Step(root, DIRECTORY, self._scope)]
        while stack:
            step = stack[-1]
            if step.children is None:
                walked = self.pages if step.scope is None else self._roots
                if step.page in walked:
                    stack.pop()
                    continue
                walked.add(step.page)
                step.children = self._open(step)
            child = next(step.children, None)
            if child is not None:
                step.seen.append(child.page)
                stack.append(child)
                continue
            stack.pop()
            self._close(step)

    def _open(self, step: "_Step") -> "Iterator[_Step]":
        try:
            page = read_page(self._objects, step.page, step.page_type)
        except DmError as error:
            self._blame(step, step.page, error.message)
            return iter(())
        self._tell()
        for span in _chunks_of(page, step.scope):
            self._check_chunk(step, span)
        if self._full and page.type == DIRECTORY and page.level == 0:
            for entry in _in_scope(page, step.scope):
                self._check_file(step, entry)
        return iter(_pages_of(page, step.scope))

    def _check_chunk(self, step: "_Step", span: Span) -> None:
        chunk = span.chunk
        if chunk in self.reasons:
            step.damage.add(chunk)
            return
        if not self._full:
            self.chunks += 1
            if not self._objects.has_key(chunk[:8]):
                self._blame(step, chunk, "chunk is missing")
            return
        if chunk not in self._chunk_bytes:
            self.chunks += 1
            try:
                self._chunk_bytes[chunk] = len(self._objects.read(Kind.CHUNK, chunk))
            except DmError as error:
                self._blame(step, chunk, error.message)
                return
            self._bytes_read += self._chunk_bytes[chunk]
            self._tell()
        if self._chunk_bytes[chunk] != span.length:
            self._blame(step, step.page, f"chunk {chunk.hex()[:12]} is not as long as its span")

    def _check_file(self, step: "_Step", entry: Entry) -> None:
        """The content id must be that of the chunks; what cannot be read is told elsewhere."""
        if entry.kind is not EntryKind.FILE:
            return
        key = (entry.layout, entry.tree, entry.size, entry.content)
        if key not in self._files:
            self._files[key] = ""
            try:
                for _ in check_content(self._objects, entry):
                    pass
            except BadObject as error:
                self._files[key] = error.message
            except (Corruption, ContentAbsent):
                pass  # the walk names the page or chunk
        if self._files[key]:
            name = entry.name.decode("utf-8", "backslashreplace")
            self._blame(step, step.page, f"file {name!a}: {self._files[key]}")

    def _tell(self) -> None:
        self._progress.reached(self._bytes_read, len(self.pages) + self.chunks)

    def _blame(self, step: "_Step", bad: ObjectId, reason: str) -> None:
        self.reasons[bad] = reason
        step.damage.add(bad)

    def _close(self, step: "_Step") -> None:
        for child in step.seen:
            step.damage |= self._damage.get(child, _NONE)
        if step.damage:
            self._damage[step.page] = frozenset(sorted(step.damage)[:DAMAGE_NAMED_MAX])


class _Step:
    """One page on the way down; with `scope` only these entries of it count."""

    __slots__ = ("children", "damage", "page", "page_type", "scope", "seen")

    def __init__(
        self, page: ObjectId, page_type: int, scope: frozenset[bytes] | None = None
    ) -> None:
        self.page = page
        self.page_type = page_type
        self.scope = scope
        self.children: Iterator[_Step] | None = None
        self.seen: list[ObjectId] = []
        self.damage: set[ObjectId] = set()


def _in_scope(page: Page, scope: frozenset[bytes] | None) -> Iterator[Entry]:
    """The entries of a directory's leaf that count."""
    return (entry for entry in page.items if scope is None or entry.name in scope)


def _pages_of(page: Page, scope: frozenset[bytes] | None) -> Iterator[_Step]:
    """The pages one page names: its children, or the roots of what its entries hold."""
    if page.level > 0:
        for child in page.items:
            yield _Step(child.page, page.type, scope)
    elif page.type == DIRECTORY:
        for entry in _in_scope(page, scope):
            if entry.tree is not None:
                is_directory = entry.kind is EntryKind.DIRECTORY
                yield _Step(entry.tree, DIRECTORY if is_directory else MANIFEST)


def _chunks_of(page: Page, scope: frozenset[bytes] | None) -> Iterator[Span]:
    """The chunks a leaf page names directly, and how long they must be."""
    if page.level > 0:
        return
    if page.type == DIRECTORY:
        for entry in _in_scope(page, scope):
            if entry.kind is EntryKind.FILE and entry.layout is FileLayout.SINGLE:
                yield Span(entry.size, ObjectId(entry.content))
        return
    for span in page.items:
        if span.chunk != ZERO_RUN:
            yield span


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
