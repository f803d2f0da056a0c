"""Objects that no honest dm makes: built byte by byte, and sent by a dm that looks at nothing.

`TreeMaker` writes any value as an entry, a page or a commit; `turn_lenient` is the hook that makes
a fork of dm read them, so that it serves and pushes them like any other.
"""

import os
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any, Final, Self

from dmsync.core import objects, pages
from dmsync.core.encoding import encode
from dmsync.core.events import CommitsAdded, DotCreated, RefChanged
from dmsync.core.ids import DotId, Kind, ObjectId
from dmsync.core.objects import Entry, EntryKind, Layout
from dmsync.core.pages import Child, Page, Span
from dmsync.engine import sync_objects
from dmsync.engine.settings import EngineSettings
from dmsync.engine.store import Store
from dmsync.errors import BadObject
from dmsync.storage.pack_writer import PackWriter

RawEntry = tuple[Any, ...]
FILE, DIRECTORY, SYMLINK, FIFO, CHARACTER, BLOCK = range(6)
SUBDOT: Final = b"__default__"
_ID: Final = 32


# --- reading without looking ---------------------------------------------------------------------


def turn_lenient() -> None:
    """From now on this process takes any entry, page and manifest for what it says."""
    setattr(objects, "entry_from_value", _any_entry)  # noqa: B010 - a test's break of one rule
    setattr(pages, "entry_from_value", _any_entry)  # noqa: B010
    setattr(pages, "_entries", lambda items: tuple(map(_any_entry, items)))  # noqa: B010
    setattr(pages, "_children", _any_children)  # noqa: B010
    setattr(pages, "_spans", _any_spans)  # noqa: B010
    setattr(sync_objects, "decode_page", _any_page)  # noqa: B010
    setattr(sync_objects, "TREE_DEPTH_MAX", 1 << 20)  # noqa: B010
    pair: Any = sync_objects._PagePair
    pair._read = lambda self, page, level, is_new: self._owner.read_page(
        page, self._type, is_new=is_new
    )
    for module in (objects, pages, sync_objects):
        setattr(module, "BadObject", _sender_refuses)  # noqa: B010


SENDER: Final = "the sender itself: "
"""Begins what a lenient dm says when it looks after all: nothing was tried then."""


def _sender_refuses(message: str, **facts: Any) -> BadObject:
    return BadObject(SENDER + message, **facts)


def _any_page(data: bytes, expected_type: int, *, trusted: bool = False) -> Page:
    try:
        return pages.decode_page(data, expected_type, trusted=True)
    except BadObject:
        return Page(expected_type, 0, ())


def _any_entry(value: Any) -> Entry:
    name, kind, mode, uid, gid, mtime, payload, hardlink, xattrs, extensions = value
    more: dict[str, Any] = {}
    if kind == FILE:
        size, content, layout, tree, sparse = payload
        more = {"size": size, "content": content, "layout": Layout(layout), "sparse": bool(sparse)}
        more["tree"] = None if tree is None else ObjectId(tree)
    elif kind == DIRECTORY:
        more = {"tree": None if payload is None else ObjectId(payload)}
    elif kind == SYMLINK:
        more = {"link_target": payload}
    elif kind in (CHARACTER, BLOCK):
        more = {"device": payload}
    number = EntryKind(kind) if kind in range(6) else EntryKind.FIFO
    return Entry(
        name, number, mode, uid, gid, mtime, hardlink=hardlink, xattrs=xattrs,
        extensions=extensions, **more,
    )  # fmt: skip


def _any_children(items: Any, page_type: int) -> tuple[Child, ...]:
    return tuple(Child(key, ObjectId(page), weight) for key, page, weight in items)


def _any_spans(items: Any) -> tuple[Span, ...]:
    lengths, ids = items
    starts = range(0, len(ids), _ID)
    return tuple(
        Span(n, ObjectId(ids[at : at + _ID])) for n, at in zip(lengths, starts, strict=True)
    )


# --- making --------------------------------------------------------------------------------------


def raw(
    name: bytes,
    kind: int,
    payload: Any = None,
    *,
    mode: int = 0o644,
    uid: int = 0,
    gid: int = 0,
    mtime_ns: int = 10**18,
    hardlink: bytes = b"",
    xattrs: Any = (),
    extensions: Any = (),
) -> RawEntry:
    """An entry's array, whatever its values."""
    return (name, kind, mode, uid, gid, mtime_ns, payload, hardlink, xattrs, extensions)


class TreeMaker:
    """Writes objects of one commit."""

    def __init__(self, writer: PackWriter) -> None:
        self.writer = writer

    def file(self, name: bytes, data: bytes = b"content", **more: Any) -> RawEntry:
        chunk = self.writer.put(Kind.CHUNK, data)
        return raw(name, FILE, (len(data), chunk, int(Layout.SINGLE), None, 0), **more)

    def symlink(self, name: bytes, target: bytes, **more: Any) -> RawEntry:
        return raw(name, SYMLINK, target, **{"mode": 0o777, **more})

    def directory(self, name: bytes, entries: Iterable[RawEntry], **more: Any) -> RawEntry:
        """Entries sorted by name, in one page."""
        ordered = tuple(sorted(entries, key=lambda entry: entry[0]))
        page = self.page(ordered) if ordered else None
        return raw(name, DIRECTORY, page, **{"mode": 0o755, **more})

    def page(
        self, items: Sequence[Any], *, level: int = 0, kind: int = pages.DIRECTORY
    ) -> ObjectId:
        """Any items as a page, in the order given."""
        return self.writer.put(Kind.PAGE, encode((kind, level, tuple(items))))

    def manifest(self, lengths: Sequence[int], ids: Sequence[bytes]) -> ObjectId:
        return self.writer.put(
            Kind.PAGE, encode((pages.MANIFEST, 0, (tuple(lengths), b"".join(ids))))
        )

    def root(self, entries: Iterable[RawEntry]) -> RawEntry:
        """A dot's root whose default subdot has these entries."""
        return self.directory(b"", [self.directory(SUBDOT, entries)])


class HostileStore:
    """A store on disk into which anything is committed."""

    def __init__(self, home: str) -> None:
        self.home = home
        self.store = Store.open(home, EngineSettings("Mallory <m@example.org>", "m"), create=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.store.close()

    def make_dot(self, name: str) -> DotId:
        dot = DotId(os.urandom(16))
        with self.store.transaction("hostile") as tx:
            tx.append(DotCreated(dot, "", name, "m"))
        return dot

    def commit(
        self,
        dot: DotId,
        build: Any,
        *,
        branch: str = "master",
        parents: Sequence[ObjectId] | None = None,
        author: str = "Mallory",
        message: str = "hostile",
    ) -> ObjectId:
        """Commit the root that `build(TreeMaker)` gives, on a branch."""
        row = self.store.catalog.ref(dot, f"branch/{branch}")
        old = None if row is None else row.target
        if parents is None:
            parents = () if old is None else (old,)
        with self.store.objects(dot).writer() as writer:
            root = build(TreeMaker(writer))
            value = (
                1, root, tuple(parents), author, author, 1_700_000_000 * 10**9, 0, message,
                (), (), (), (),
            )  # fmt: skip
            commit = writer.put(Kind.COMMIT, encode(value))
            writer.seal()
        with self.store.transaction("hostile") as tx:
            tx.append(CommitsAdded(dot, (commit,)))
            kind = "create" if old is None else "commit"
            tx.append(RefChanged(dot, f"branch/{branch}", old, commit, kind))
        return commit
