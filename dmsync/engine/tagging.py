"""Making, listing and deleting tags, light and annotated (engine/tags: what they name)."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from dmsync.core.events import Event, RefChanged, SignatureAdded
from dmsync.core.graph import is_ancestor
from dmsync.core.ids import DotId, Kind, ObjectId, object_id
from dmsync.core.names import check_tag_name
from dmsync.core.objects import MESSAGE_BYTES_MAX, Tag
from dmsync.engine.revision_lookup import resolve_revision
from dmsync.engine.signatures import SigningKey, sign
from dmsync.engine.store import Store
from dmsync.engine.tags import annotation, peel
from dmsync.errors import AlreadyExists, RevisionNotFound, UsageError
from dmsync.storage.catalog import DotRow


@dataclass(frozen=True)
class TagRequest:
    """What a user asks of `dm tag NAME`. With `message` the tag is annotated; `signing` signs it
    and needs a message. `force` moves a tag that is there."""

    name: str
    revision: str = "HEAD"
    message: str | None = None
    signing: SigningKey | None = None
    force: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class TagSummary:
    """What making a tag did. `target` is what the ref names: the tag object when annotated, else
    the commit; None for a dry run of an annotated one. `old` is what it named before."""

    name: str
    commit: ObjectId
    target: ObjectId | None
    old: ObjectId | None
    is_annotated: bool
    is_signed: bool


@dataclass(frozen=True)
class TagInfo:
    """A tag as `dm tag` lists it; `tag` is None for a light one."""

    name: str
    target: ObjectId
    commit: ObjectId
    tag: Tag | None
    is_signed: bool


def find_signed(store: Store, dot: DotRow, text: str) -> tuple[Kind, ObjectId]:
    """What `text` names as a signature sees it: an annotated tag itself, else a commit.

    Raises as `resolve_revision`.
    """
    row = store.catalog.ref(dot.dot, text if text.startswith("tag/") else f"tag/{text}")
    if row is not None and annotation(store, dot.dot, row.target) is not None:
        return Kind.TAG, row.target
    return Kind.COMMIT, resolve_revision(store, dot, text)


# --- listing -------------------------------------------------------------------------------------


def list_tags(
    store: Store, dot: DotRow, patterns: Sequence[str] = (), contains: str | None = None
) -> list[TagInfo]:
    """Tags by name; only those that match one of `patterns` (`v1.*`) and whose commit is, or
    descends from, what `contains` names.

    Raises as `resolve_revision`.
    """
    found = list(_tags(store, dot.dot, patterns))
    if contains is None:
        return found
    graph = store.catalog.graph(dot.dot)
    commit = resolve_revision(store, dot, contains)
    return [info for info in found if is_ancestor(graph, commit, info.commit)]


def _tags(store: Store, dot: DotId, patterns: Sequence[str]) -> Iterator[TagInfo]:
    for row in store.catalog.refs(dot, "tag/"):
        name = row.short_name
        if patterns and not any(fnmatchcase(name, pattern) for pattern in patterns):
            continue
        tag = annotation(store, dot, row.target)
        is_signed = tag is not None and bool(store.catalog.signatures(dot, row.target))
        yield TagInfo(name, row.target, tag.target if tag else row.target, tag, is_signed)


# --- changing ------------------------------------------------------------------------------------


def create_tag(store: Store, dot: DotRow, request: TagRequest) -> TagSummary:
    """Make or (with `force`) move a tag.

    Raises:
        InvalidName, UsageError (an empty or oversized message, a signature without one).
        AlreadyExists: there is a tag of that name, and no `force`.
        RevisionNotFound and its kin, SigningFailed, RefConflict (somebody was faster).
    """
    check_tag_name(request.name)
    _check_message(request)
    commit = resolve_revision(store, dot, request.revision)
    ref = f"tag/{request.name}"
    row = store.catalog.ref(dot.dot, ref)
    old = None if row is None else row.target
    if old is not None and not request.force:
        raise AlreadyExists(
            f"Tag already exists: {request.name} at {peel(store, dot.dot, old).hex()[:12]}",
            hint="--force moves it",
            tag=request.name,
        )
    if request.dry_run:
        light = None if request.message is not None else commit
        return _summary(request, commit, light, old)
    target, events = commit, list[Event]()
    if request.message is not None:
        target, events = _annotated(store, dot.dot, request, commit)
    if target != old:
        events.insert(0, RefChanged(dot.dot, ref, old, target, "tag", f"tag {request.revision}"))
    with store.transaction("tag") as tx:
        for event in events:
            tx.append(event)
    return _summary(request, commit, target, old)


def _check_message(request: TagRequest) -> None:
    if request.message is None:
        if request.signing is not None:
            raise UsageError("a signed tag needs a message", hint='dm tag -s NAME -m "MESSAGE"')
        return
    if not request.message.strip():
        raise UsageError("Please provide a message for the tag", hint='dm tag NAME -m "MESSAGE"')
    if len(request.message.encode()) > MESSAGE_BYTES_MAX:
        raise UsageError("the message is longer than 1 MiB")


def _annotated(
    store: Store, dot: DotId, request: TagRequest, commit: ObjectId
) -> tuple[ObjectId, list[Event]]:
    """The stored tag object and the event of its signature."""
    assert request.message is not None
    time_ns, offset_minutes = store.clock()
    author = store.settings.author
    tag = Tag(commit, request.name, author, time_ns, offset_minutes, request.message)
    data = tag.to_bytes()
    oid = object_id(Kind.TAG, data)
    events: list[Event] = []
    if request.signing is not None:
        events.append(SignatureAdded(dot, oid, sign(request.signing, Kind.TAG, oid)))
    with store.objects(dot).writer() as writer:
        writer.put(Kind.TAG, data)
        writer.seal()
    return oid, events


def _summary(
    request: TagRequest, commit: ObjectId, target: ObjectId | None, old: ObjectId | None
) -> TagSummary:
    is_annotated, is_signed = request.message is not None, request.signing is not None
    return TagSummary(request.name, commit, target, old, is_annotated, is_signed)


def delete_tags(
    store: Store, dot: DotRow, names: Sequence[str], *, dry_run: bool = False
) -> list[TagInfo]:
    """Delete all these tags or none; returns what they were. The objects stay until gc.

    Raises:
        RevisionNotFound: one of them does not exist.
    """
    here = {info.name: info for info in list_tags(store, dot)}
    for name in names:
        if name not in here:
            raise RevisionNotFound(f"Tag does not exist: {name}", hint="dm tag lists them")
    gone = [here[name] for name in dict.fromkeys(names)]
    if gone and not dry_run:
        with store.transaction("tag") as tx:
            for info in gone:
                ref = f"tag/{info.name}"
                tx.append(RefChanged(dot.dot, ref, info.target, None, "delete", "tag deleted"))
    return gone
