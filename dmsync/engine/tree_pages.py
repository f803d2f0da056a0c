"""What one page of a tree names: further pages, and chunks. For whoever walks all there is."""

from collections.abc import Iterator
from typing import NamedTuple

from dmsync.core.ids import ObjectId
from dmsync.core.objects import Entry, EntryKind
from dmsync.core.objects import Layout as FileLayout
from dmsync.core.pages import DIRECTORY, MANIFEST, ZERO_RUN, Page, Span

Scope = frozenset[bytes] | None
"""Names of the subdots whose content is kept; None: of all."""


class PageBelow(NamedTuple):
    """A page, its type, and which of its entries count."""

    page: ObjectId
    page_type: int
    scope: Scope = None


def in_scope(page: Page, scope: Scope) -> Iterator[Entry]:
    """The entries of a directory's leaf that count."""
    return (entry for entry in page.items if scope is None or entry.name in scope)


def pages_below(page: Page, scope: Scope) -> Iterator[PageBelow]:
    """The pages one page names: its children, or the roots of what its entries hold."""
    if page.level > 0:
        for child in page.items:
            yield PageBelow(child.page, page.type, scope)
    elif page.type == DIRECTORY:
        for entry in in_scope(page, scope):
            if entry.tree is not None:
                is_directory = entry.kind is EntryKind.DIRECTORY
                yield PageBelow(entry.tree, DIRECTORY if is_directory else MANIFEST)


def chunks_of(page: Page, scope: Scope) -> Iterator[Span]:
    """The chunks a leaf page names directly, and how long they must be."""
    if page.level > 0:
        return
    if page.type == DIRECTORY:
        for entry in in_scope(page, scope):
            if entry.kind is EntryKind.FILE and entry.layout is FileLayout.SINGLE:
                yield Span(entry.size, ObjectId(entry.content))
        return
    for span in page.items:
        if span.chunk != ZERO_RUN:
            yield span
