"""Bundles: what a fetch would bring, in a file (protocol/BUNDLE.md).

Writing plans and encodes as a server does. Reading checks the closing hash first and hands out
frames; who applies a bundle fetches from it (transports/bundle.py plays the server), so that
every check of a fetch holds for a file, too.
"""

import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import BinaryIO, Final

from blake3 import blake3

from dmsync.core.graph import GraphView, ancestors_difference, is_ancestor
from dmsync.core.ids import ObjectId
from dmsync.core.records import parse_header
from dmsync.core.revisions import Range, Revision, parse_revision_or_range
from dmsync.engine import tags
from dmsync.engine.progress import SILENT, Progress
from dmsync.engine.revision_lookup import commit_named, resolve_range
from dmsync.engine.store import Store
from dmsync.engine.sync_hollow import holding_of, select_for_fetch
from dmsync.engine.sync_records import Outgoing, joined_records
from dmsync.engine.sync_tags import advertised_tags, signature_pages
from dmsync.errors import (
    AlreadyExists,
    BadBundle,
    ContentAbsent,
    NotFound,
    NothingToDo,
    ProtocolError,
    RevisionNotFound,
    UsageError,
)
from dmsync.storage.catalog import DotRow, RefRow
from dmsync.storage.durable import whole_file
from dmsync.storage.stages import stage
from dmsync.wire.bundle_header import (
    BUNDLE_CONTEXT,
    BUNDLE_MAGIC,
    BundleHeader,
    header_from_bytes,
)
from dmsync.wire.frames import FrameBuffer, encode_frame
from dmsync.wire.limits import BUNDLE_HEADER_BYTES_MAX, BUNDLE_REFS_MAX, FRONTIER_MAX
from dmsync.wire.messages import (
    Fetch,
    Plan,
    Records,
    RefValue,
    Signatures,
    frame_from_message,
    message_from_frame,
)

HASH_BYTES: Final = 32
NO_TRANSFER: Final = bytes(16)
"""In place of a transfer's id: who applies the bundle gives it one."""
_READ_BYTES: Final = 1024 * 1024
_LENGTH: Final = struct.Struct(">I")
_SHOWN_MAX: Final = 5
_FILE_MODE: Final = 0o666
"""Less the umask: a bundle is a file like others."""


@dataclass(frozen=True)
class BundleRequest:
    """What to write. `revisions`: branches, tags, or ranges `A..B` that end in one; none: the
    current branch. `every_branch` adds all branches, `every_tag` all tags."""

    path: str
    revisions: tuple[str, ...] = ()
    every_branch: bool = False
    every_tag: bool = False
    overwrite: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class BundleSummary:
    """A bundle's header and its size in bytes (0 for a dry run)."""

    header: BundleHeader
    bytes_written: int


# --- writing -------------------------------------------------------------------------------------


def create_bundle(
    store: Store, dot: DotRow, request: BundleRequest, progress: Progress = SILENT
) -> BundleSummary:
    """Write a bundle; the file has its name when it is whole and durable.

    Raises:
        UsageError: a revision that is no branch or tag. RevisionNotFound. AlreadyExists: the file
            is there. NothingToDo: no commit is left. ContentAbsent: what it builds on is here by
            its record alone, or this is a partial clone. StorageFull, StorageFailed.
    """
    if not request.overwrite and os.path.lexists(request.path):
        raise AlreadyExists(f"{request.path} exists already", hint="--force writes over it")
    kept = store.catalog.scope(dot.dot)
    if kept is not None:
        raise ContentAbsent(
            f"only {', '.join(kept)} of {dot.name} is kept here: a bundle would lack the rest",
            hint="make the bundle where all of it is",
        )
    refs, excluded = _ends(store, dot, request)
    graph = store.catalog.graph(dot.dot)
    tips = tuple(ref.commit for ref in refs)
    commits = list(ancestors_difference(graph, tips, excluded))
    if not commits:
        raise NothingToDo("no commits are left for the bundle")
    outside = _outside(graph, commits, tips)
    for commit in outside:
        store.root(dot.dot, commit)  # its content must be there for who applies the bundle
    here = holding_of(store, dot.dot)
    selection = select_for_fetch(here, Fetch(b"", dot.dot, tips, tuple(outside)))
    outgoing = Outgoing(store.objects(dot.dot))
    progress.phase("planning")
    with stage("plan"):
        for _ in outgoing.add(selection):
            progress.reached(0, len(outgoing.plan))
    outgoing.add_tags(ref.id for ref in refs if ref.peeled is not None)
    header = BundleHeader(
        cluster_id=store.catalog.cluster_id(),
        epoch=store.catalog.epoch(),
        seq=store.catalog.last_seq(),
        dot=dot.dot,
        namespace=dot.namespace,
        name=dot.name,
        head=_head(store, dot, refs),
        refs=tuple(refs),
        prerequisites=tuple(outside),
        commits_count=len(commits),
        hollow_count=outgoing.hollow_count,
        records_count=len(outgoing.plan),
    )
    if request.dry_run:
        return BundleSummary(header, 0)
    signed = [*commits, *(ref.id for ref in refs if ref.peeled is not None)]
    signatures = list(signature_pages(store, dot.dot, NO_TRANSFER, signed))
    content = _content(header, outgoing, signatures, progress)
    with stage("write"):
        return BundleSummary(header, _write(request.path, content))


def _head(store: Store, dot: DotRow, refs: Sequence[RefValue]) -> str | None:
    """The branch that a dot made of the bundle begins on: one that the bundle has."""
    branches = [ref.name.removeprefix("branch/") for ref in refs if ref.name.startswith("branch/")]
    current = store.catalog.head(dot.dot)
    return current if current in branches else next(iter(branches), None)


def _outside(
    graph: GraphView, commits: Sequence[ObjectId], tips: Sequence[ObjectId]
) -> list[ObjectId]:
    """What the bundle's commits stand on, by id. Raises UsageError when that is too much."""
    included = set(commits)
    outside = {p for c in commits for p in graph.parents(c) if p not in included}
    outside.update(tip for tip in tips if tip not in included)
    if len(outside) > FRONTIER_MAX:
        raise UsageError(f"the bundle would need more than {FRONTIER_MAX} other commits")
    return sorted(outside)


def _ends(
    store: Store, dot: DotRow, request: BundleRequest
) -> tuple[list[RefValue], list[ObjectId]]:
    """The refs of the bundle, by name, and what it leaves out."""
    names: set[str] = set()
    excluded: list[ObjectId] = []
    given = request.revisions
    if not given and not request.every_branch and not request.every_tag:
        given = ("HEAD",)
    for text in given:
        parsed = parse_revision_or_range(text)
        if isinstance(parsed, Range):
            if parsed.symmetric:
                raise UsageError(f"{text}: a bundle takes A..B, not A...B")
            excluded += resolve_range(store, dot, text)[1]
            parsed = parsed.right
        names.add(_ref_name(store, dot, parsed, text))
    rows = store.catalog.refs(dot.dot)
    if request.every_branch:
        names.update(row.name for row in rows if row.name.startswith("branch/"))
    if request.every_tag:
        names.update(tag.name for tag in advertised_tags(store, dot.dot, annotated=True))
    refs = [_ref_value(store, dot, row) for row in rows if row.name in names]
    if not refs or len(refs) > BUNDLE_REFS_MAX:
        raise UsageError(f"a bundle has 1 to {BUNDLE_REFS_MAX} branches and tags, not {len(refs)}")
    return refs, excluded


def _ref_value(store: Store, dot: DotRow, row: RefRow) -> RefValue:
    is_tag = row.name.startswith("tag/")
    tag = tags.annotation(store, dot.dot, row.target) if is_tag else None
    return RefValue(row.name, row.target, row.origin, tag.target if tag else None)


def _ref_name(store: Store, dot: DotRow, revision: Revision, text: str) -> str:
    """`branch/x` or `tag/x`. Raises RevisionNotFound, UsageError."""
    base = store.catalog.head(dot.dot) if revision.is_head else revision.base
    if not revision.steps:
        for name in (f"branch/{base}", f"tag/{base}"):
            if store.catalog.ref(dot.dot, name) is not None:
                return name
        if revision.is_head:
            raise RevisionNotFound(f"branch {base} has no commits yet")
    commit_named(store, dot, revision)
    raise UsageError(
        f"{text} does not end in a branch or tag: who applies the bundle needs a name",
        hint=f"dm branch NAME {base} makes one",
    )


def _write(path: str, content: Iterable[bytes]) -> int:
    """Write a file under its name once it is whole, with the closing hash; returns its size."""
    hasher = blake3(derive_key_context=BUNDLE_CONTEXT)
    with whole_file(path, mode=_FILE_MODE) as file:
        for piece in content:
            hasher.update(piece)
            file.write(piece)
        file.write(hasher.digest())
        return file.tell()


def _content(
    header: BundleHeader,
    outgoing: Outgoing,
    signatures: Iterable[Signatures],
    progress: Progress,
) -> Iterator[bytes]:
    """The file without its closing hash."""
    value = header.to_bytes()
    yield BUNDLE_MAGIC + _LENGTH.pack(len(value)) + value
    for page in outgoing.pages(eager=False):
        yield encode_frame(frame_from_message(page))
    records = written = 0
    progress.phase("writing", items_total=len(outgoing.plan))
    for joined, count in joined_records(outgoing.records()):
        yield encode_frame(frame_from_message(Records(joined)))
        records, written = records + count, written + len(joined)
        progress.reached(written, records)
    for message in signatures:
        yield encode_frame(frame_from_message(message))


# --- reading -------------------------------------------------------------------------------------


class Bundle:
    """An open bundle whose closing hash is right; `messages` reads its frames from the start."""

    def __init__(self, file: BinaryIO, path: str, header: BundleHeader, start: int, end: int):
        self.path = path
        self.header = header
        self._file = file
        self._start = start
        self._end = end

    def messages(self) -> Iterator[Plan | Records | Signatures]:
        """PLAN pages, RECORDS, SIGNATURES. Raises BadBundle when the frames are anything else."""
        frames = FrameBuffer()
        frames.handshaken = True
        self._file.seek(self._start)
        left = self._end - self._start
        is_planned = False
        while left:
            data = self._file.read(min(left, _READ_BYTES))
            if not data:
                raise BadBundle(f"{self.path} got shorter while it was read")
            left -= len(data)
            frames.feed(data)
            try:
                for message in map(message_from_frame, frames.frames()):
                    if isinstance(message, Plan) and not is_planned and not message.eager:
                        is_planned = message.last
                        yield message
                    elif isinstance(message, Records | Signatures) and is_planned:
                        yield message
                    else:
                        raise ProtocolError(f"{message.TYPE.name} where none may be")
            except ProtocolError as exc:
                raise BadBundle(f"{self.path}: {exc.message}") from exc
        if frames.buffered_bytes or not is_planned:
            raise BadBundle(f"{self.path} ends within a frame")


@contextmanager
def open_bundle(path: str) -> Iterator[Bundle]:
    """Open a bundle and check its closing hash: reads the whole file once.

    Raises:
        NotFound: no such file. BadBundle: no bundle, truncated or changed. FormatUnsupported.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 - closed below
    except (FileNotFoundError, IsADirectoryError) as exc:
        raise NotFound(f"no bundle at {path}: {exc.strerror}") from exc
    except OSError as exc:
        raise BadBundle(f"cannot read {path}: {exc.strerror}") from exc
    with file:
        try:
            yield _opened(file, path)
        except OSError as exc:
            raise BadBundle(f"cannot read {path}: {exc.strerror}") from exc


def _opened(file: BinaryIO, path: str) -> Bundle:
    prefix = file.read(len(BUNDLE_MAGIC) + _LENGTH.size)
    if not prefix.startswith(BUNDLE_MAGIC):
        raise BadBundle(f"{path} is no bundle", hint="dm bundle create makes one")
    end = os.fstat(file.fileno()).st_size - HASH_BYTES
    if len(prefix) < len(BUNDLE_MAGIC) + _LENGTH.size or end <= len(prefix):
        raise BadBundle(f"{path} is truncated")
    (length,) = _LENGTH.unpack(prefix[len(BUNDLE_MAGIC) :])
    if not 0 < length <= BUNDLE_HEADER_BYTES_MAX or len(prefix) + length > end:
        raise BadBundle(f"{path} is truncated or changed: its header does not fit")
    with stage("verify"):
        _check_hash(file, path, end)
    file.seek(len(prefix))
    header = header_from_bytes(file.read(length))
    return Bundle(file, path, header, len(prefix) + length, end)


def _check_hash(file: BinaryIO, path: str, end: int) -> None:
    hasher = blake3(derive_key_context=BUNDLE_CONTEXT)
    file.seek(0)
    left = end
    while left:
        data = file.read(min(left, _READ_BYTES))
        if not data:
            break
        hasher.update(data)
        left -= len(data)
    if left or file.read(HASH_BYTES) != hasher.digest():
        raise BadBundle(
            f"{path} is truncated or changed: its closing hash does not fit",
            hint="copy it again",
        )


def verify_bundle(bundle: Bundle) -> int:
    """Check all frames against the plan and the header; returns the bytes of records.

    What the records decode to is checked when they are applied, against what they stand on.
    Raises BadBundle.
    """
    planned = records = size = 0
    for message in bundle.messages():
        if isinstance(message, Plan):
            if message.first_index != planned:
                raise BadBundle(f"{bundle.path}: the plan's pages do not follow each other")
            planned += len(message.kinds)
        elif isinstance(message, Records):
            records += count_records(message.joined)
            size += len(message.joined)
    if not planned == records == bundle.header.records_count:
        raise BadBundle(
            f"{bundle.path}: {planned} objects are planned, {records} are there, "
            f"{bundle.header.records_count} are announced"
        )
    return size


def count_records(joined: bytes) -> int:
    """Records in the payload of a RECORDS frame. Raises BadObject."""
    offset = count = 0
    while offset < len(joined):
        _, start, payload_bytes = parse_header(joined, offset)
        offset, count = start + payload_bytes, count + 1
    return count


def missing_prerequisites(store: Store, header: BundleHeader) -> list[ObjectId]:
    """Commits the bundle builds on whose content is not here."""
    if store.catalog.dot(header.dot) is None:
        return list(header.prerequisites)
    return [c for c in header.prerequisites if store.catalog.is_hollow(header.dot, c)]


def builds_on(store: Store, header: BundleHeader) -> Callable[[ObjectId], bool]:
    """Says of a commit that is here whether the bundle builds on it, near or far."""
    graph = store.catalog.graph(header.dot) if store.catalog.dot(header.dot) else None

    def is_below(commit: ObjectId) -> bool:
        if graph is None or not graph.has(commit):
            return False
        return any(is_ancestor(graph, commit, top) for top in header.prerequisites)

    return is_below


def refuse_missing(store: Store, header: BundleHeader) -> None:
    """Raises RevisionNotFound, naming what the bundle builds on and is not here."""
    missing = missing_prerequisites(store, header)
    if missing:
        shown = ", ".join(commit.hex()[:12] for commit in missing[:_SHOWN_MAX])
        raise RevisionNotFound(
            f"the bundle builds on {len(missing)} commits that are not here: {shown}",
            hint="apply the bundle that holds them first, or make one of the whole history",
            commits=[commit.hex() for commit in missing[:_SHOWN_MAX]],
        )
