"""What patches make of an object, page by page: only what changes is copied.

Patches of databases touch a few of an object's pages, so that laying them over a copy is mostly
copying. Unverified, as everything that a chain gives before its end.
"""

from collections.abc import Sequence
from typing import Final

from dmsync.core.delta import PATCH_PAGE_BYTES, decode_pages
from dmsync.core.records import SIMILAR_PAGE_BYTES, Record, patched_pages
from dmsync.errors import BadObject

_RATIO: Final = SIMILAR_PAGE_BYTES // PATCH_PAGE_BYTES

Pages = dict[int, bytes]
"""4 KiB pages by number."""


class PatchedContent:
    """The bytes a chain starts with and the 4 KiB pages that its patches have replaced so far."""

    def __init__(self, first: bytes) -> None:
        self._first = first
        self._replaced: Pages = {}

    def decoded(self, patch: Record) -> Pages:
        """The pages that a patch of this state gives. Raises BadObject."""
        if patch.raw_bytes != len(self._first):
            raise BadObject("a patch and its base have the same length")
        pages = patched_pages(patch.changed)
        if pages[-1] * PATCH_PAGE_BYTES >= len(self._first):
            raise BadObject("a patch of a page behind the end")
        first, known, size = self._first, self._replaced, PATCH_PAGE_BYTES
        old = [
            known[page] if page in known else first[page * size : (page + 1) * size]
            for page in pages
        ]
        return dict(zip(pages, decode_pages(patch.payload, old), strict=True))

    def replace(self, pages: Pages) -> None:
        """Go on to the state in which these pages are replaced."""
        self._replaced.update(pages)

    def similar_page(self, page: int) -> bytes:
        """The 8 KiB page of this number. Raises BadObject when the object ends before it."""
        start = page * _RATIO
        if not self._replaced.keys().isdisjoint(range(start, start + _RATIO)):
            return b"".join([self._page(number) for number in range(start, start + _RATIO)])
        content = self._first[page * SIMILAR_PAGE_BYTES : (page + 1) * SIMILAR_PAGE_BYTES]
        if not content:
            raise BadObject("base has no such page")
        return content

    def joined(self) -> bytes:
        """The whole object."""
        if not self._replaced:
            return self._first
        view = memoryview(self._first)
        parts: list[bytes | memoryview] = []
        copied = 0
        for number in sorted(self._replaced):
            start = number * PATCH_PAGE_BYTES
            if start > copied:
                parts.append(view[copied:start])
            parts.append(self._replaced[number])
            copied = start + PATCH_PAGE_BYTES
        parts.append(view[copied:])
        return b"".join(parts)

    def _page(self, number: int) -> bytes:
        replaced = self._replaced.get(number)
        if replaced is not None:
            return replaced
        return self._first[number * PATCH_PAGE_BYTES : (number + 1) * PATCH_PAGE_BYTES]


def touching(deltas: Sequence[Record], pages: int) -> list[Record] | None:
    """Of patches, the last one first, those that some patch pages, named by bits, depend on; None
    when not all are patches."""
    kept = []
    for record in deltas:
        if not record.changed:
            return None
        if record.changed & pages:
            kept.append(record)
            pages |= record.changed
    return kept
