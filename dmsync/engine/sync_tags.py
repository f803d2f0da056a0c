"""Annotated tags and signatures in a transfer (WIRE.md 5.6): what to send, and what to believe.

A signature that comes in is stored and never trusted: who reads it decides whose count.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from dmsync.core.events import Event, SignatureAdded
from dmsync.core.graph import GraphView, ancestors_difference
from dmsync.core.ids import DotId, Kind, ObjectId
from dmsync.core.objects import Tag, tag_from_bytes
from dmsync.engine.ports import SyncStore
from dmsync.engine.tags import annotation
from dmsync.errors import BadObject, Corruption, ProtocolError, RevisionNotFound
from dmsync.storage.catalog_queries import CatalogQueries
from dmsync.wire.limits import (
    SIGNATURES_BYTES_MAX,
    SIGNATURES_PAGE_MAX,
    SIGNATURES_PER_OBJECT_MAX,
)
from dmsync.wire.messages import RefValue, Signatures

_PAGE_BYTES = 256 * 1024


class _Objects(Protocol):
    """A dot's objects, with or without what is in quarantine."""

    def has(self, kind: Kind, oid: ObjectId) -> bool: ...

    def read(self, kind: Kind, oid: ObjectId) -> bytes: ...


# --- tags ----------------------------------------------------------------------------------------


def advertised_tags(store: SyncStore, dot: DotId, *, annotated: bool) -> list[RefValue]:
    """The dot's tags; the annotated ones only for a peer that knows such. One that is damaged is
    left out (it is not worth refusing the branches for, and fsck names it), as is one of a commit
    whose content is not here: it could not be a tip at the peer."""
    found = []
    for row in store.catalog.refs(dot, "tag/"):
        try:
            tag = annotation(store, dot, row.target)
        except Corruption:
            continue
        commit = row.target if tag is None else tag.target
        if store.catalog.is_hollow(dot, commit):
            continue
        if tag is None:
            found.append(RefValue(row.name, row.target))
        elif annotated:
            found.append(RefValue(row.name, row.target, None, commit))
    return found


def tags_to_send(
    store: SyncStore,
    dot: DotId,
    asked: Iterable[ObjectId],
    wants: Iterable[ObjectId],
    frontier: Iterable[ObjectId],
) -> list[ObjectId]:
    """Those of the asked tag objects that name what the client has or gets.

    Raises:
        RevisionNotFound: one of them is no annotated tag of the dot (any more).
    """
    values = advertised_tags(store, dot, annotated=True)
    targets = {value.id: value.peeled for value in values if value.peeled is not None}
    found = list(dict.fromkeys(asked))
    if any(tag not in targets for tag in found):
        raise RevisionNotFound("a commit or tag that was asked for is not here (any more)")
    graph = store.catalog.graph(dot)
    there = [*wants, *(commit for commit in frontier if graph.has(commit))]
    lacking = set(ancestors_difference(graph, [targets[tag] for tag in found], there))
    return [tag for tag in found if targets[tag] not in lacking]


def received_tag(objects: _Objects, ref: str, oid: ObjectId) -> Tag | None:
    """The annotated tag that `ref` is to name; None when `oid` is no tag object that is here.

    Raises:
        BadObject: it bears another name.
    """
    if not ref.startswith("tag/") or not objects.has(Kind.TAG, oid):
        return None
    tag = tag_from_bytes(objects.read(Kind.TAG, oid))
    if ref != f"tag/{tag.name}":
        raise BadObject(f"the tag object of {ref} is called {tag.name}")
    return tag


def check_received(objects: _Objects, tags: Mapping[str, RefValue]) -> None:
    """Check what came of the annotated tags (by ref) before anything of it is kept.

    Raises:
        BadObject: a tag object bears another name, or names another commit than was advertised.
    """
    for ref, value in tags.items():
        tag = received_tag(objects, ref, value.id)
        if tag is not None and tag.target != value.peeled:
            raise BadObject(f"the tag object of {ref} names another commit than was said")


# --- signatures ----------------------------------------------------------------------------------


def signature_pages(
    store: SyncStore, dot: DotId, transfer: bytes, targets: Iterable[ObjectId]
) -> Iterator[Signatures]:
    """The signatures of these commits (parents first) and tags as messages, the newest first; as
    many as a transfer may carry."""
    signed = store.catalog.signed(dot)
    page: list[tuple[ObjectId, bytes]] = []
    page_bytes = total = 0
    for target in reversed([target for target in targets if target in signed]):
        for signature in store.catalog.signatures(dot, target)[:SIGNATURES_PER_OBJECT_MAX]:
            total += len(signature)
            if total > SIGNATURES_BYTES_MAX:
                break
            page.append((target, signature))
            page_bytes += len(signature)
            if page_bytes > _PAGE_BYTES or len(page) == SIGNATURES_PAGE_MAX:
                yield Signatures(transfer, tuple(page))
                page, page_bytes = [], 0
    if page:
        yield Signatures(transfer, tuple(page))


class ReceivedSignatures:
    """Signatures that came in a transfer, bounded; nothing is recorded before it ends."""

    def __init__(self) -> None:
        self._found: dict[ObjectId, list[bytes]] = {}
        self._bytes = 0

    def take(self, message: Signatures, transfer: bytes) -> None:
        """Raises ProtocolError: of another transfer, more than allowed, no SSH signature."""
        if message.transfer != transfer:
            raise ProtocolError("SIGNATURES of another transfer")
        for target, signature in message.signatures:
            self._bytes += len(signature)
            if self._bytes > SIGNATURES_BYTES_MAX:
                raise ProtocolError("more signatures than a transfer may carry")
            if (
                not signature.startswith(b"-----BEGIN SSH SIGNATURE-----")
                or not signature.isascii()
            ):
                raise ProtocolError("SIGNATURES holds something else")
            self._found.setdefault(target, []).append(signature)

    def check(self, is_here: Callable[[ObjectId], bool]) -> None:
        """Raises ProtocolError when one is of something that is not here with the transfer."""
        if not all(map(is_here, self._found)):
            raise ProtocolError("a signature of something that was not sent")

    def events(self, catalog: CatalogQueries, dot: DotId) -> list[Event]:
        """What to record beside what was signed: only what is new, and so many of one target."""
        events: list[Event] = []
        for target, found in self._found.items():
            known = catalog.signatures(dot, target)
            room = max(0, SIGNATURES_PER_OBJECT_MAX - len(known))
            new = [signature for signature in dict.fromkeys(found) if signature not in known]
            events += [SignatureAdded(dot, target, signature) for signature in new[:room]]
        return events


def is_here(
    graph: GraphView, objects: _Objects, arrived: Iterable[ObjectId]
) -> Callable[[ObjectId], bool]:
    """Whether a commit or tag is here, what `arrived` counted in."""
    new = frozenset(arrived)
    return lambda oid: oid in new or graph.has(oid) or objects.has(Kind.TAG, oid)
