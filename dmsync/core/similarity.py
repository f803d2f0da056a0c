"""Similar pages: 8 KiB pages of older chunks that share content with a new chunk.

A write-ahead log holds images of the pages that changed; a moved or renamed file holds what
another one held. Pages and chunks are cut into small content-defined pieces; pages that share
pieces with a chunk are its prefix. Source: protocol/PACKS.md 6; measurements in decisions.
"""

from dataclasses import dataclass
from typing import Final

import xxhash
import zstandard

from dmsync.core.chunking import cutter
from dmsync.core.delta import decompress
from dmsync.core.records import BaseSlice

PIECE_BYTES: Final = (64, 256, 1024)
"""Minimum, average, maximum. Four times larger ones find a third less
(protocol/decisions/0001-pack-format.md)."""
COMMON_PIECE_PAGES: Final = 8
"""A piece found in more pages (zeros, page headers) says nothing about likeness."""
PAGES_PER_CHUNK_MAX: Final = 32
INDEXED_PAGES_MAX: Final = 12_288
"""About 35 MiB of piece table."""
HELD_BYTES_MAX: Final = 64 * 1024 * 1024
"""Page contents as they are held."""
HELD_PLAIN_BYTES_MAX: Final = 48 * 1024 * 1024
"""Pages beyond are held compressed (database pages shrink to about a thousand bytes); it takes as
long as cutting them into pieces, so that what an ordinary commit replaces is held as it is."""
_HELD_LEVEL: Final = -1
"""A tenth of the time of level 3, and a quarter larger."""


@dataclass(frozen=True, slots=True)
class SimilarPage:
    """One page that may serve as prefix; `steps` is what reading its chunk takes."""

    base: BaseSlice
    steps: int
    held: bytes
    """The content, or a frame of it, which is shorter."""
    length: int

    @property
    def content(self) -> bytes:
        if len(self.held) == self.length:
            return self.held
        return decompress(self.held, self.length)


class PageIndex:
    """Pages by the pieces in them; bounded, later pages than the bound are not taken.

    Features are computed at the first search: many commits never search.
    """

    def __init__(
        self,
        pages_max: int = INDEXED_PAGES_MAX,
        plain_bytes_max: int = HELD_PLAIN_BYTES_MAX,
    ) -> None:
        self._pages: list[SimilarPage] = []
        self._pages_max = pages_max
        self._plain_bytes_max = plain_bytes_max
        self._held_bytes = 0
        self._indexed = 0
        self._places: dict[int, int | list[int]] = {}
        self._compressor = zstandard.ZstdCompressor(level=_HELD_LEVEL)

    def __len__(self) -> int:
        return len(self._pages)

    @property
    def is_full(self) -> bool:
        return len(self._pages) >= self._pages_max or self._held_bytes >= HELD_BYTES_MAX

    def add(self, key: bytes, steps: int, page: int, content: bytes) -> None:
        """Remember page number `page` (of 8 KiB), which holds `content`, of a chunk."""
        if self.is_full:
            return
        held = content
        if self._held_bytes + len(content) > self._plain_bytes_max:
            frame = self._compressor.compress(content)
            if len(frame) < len(content):
                # A copy: what the compressor made was longer first, and its end would stay a hole
                # among the frames held that is too small for the next one.
                held = bytes(memoryview(frame))
        self._held_bytes += len(held)
        self._pages.append(SimilarPage(BaseSlice(key, page), steps, held, len(content)))

    def similar(self, data: bytes, *, steps_max: int) -> list[SimilarPage]:
        """At most 32 pages that share most with `data`, the best one last.

        Greedy: each next page is the one that adds most pieces not yet covered. Together the
        chunks they lie in take at most `steps_max` frames to read.
        """
        self._index_new_pages()
        holds: dict[int, set[int]] = {}
        for piece in _pieces(data):
            for number in self._rare_places(piece):
                holds.setdefault(number, set()).add(piece)
        chosen = self._greedy_cover(holds, steps_max)
        return [self._pages[number] for number in reversed(chosen)]

    def _greedy_cover(self, holds: dict[int, set[int]], steps_max: int) -> list[int]:
        chosen: list[int] = []
        steps_of: dict[bytes, int] = {}
        covered: set[int] = set()
        # Gains only shrink as pieces get covered, so a candidate whose gain was recomputed and
        # still leads is the best one: most candidates are never looked at again.
        order = sorted(holds, key=lambda number: (len(holds[number]), number))
        while order and len(chosen) < PAGES_PER_CHUNK_MAX:
            number = order.pop()
            gained = holds[number] - covered
            if not gained:
                continue
            if len(gained) < len(holds[number]):
                holds[number] = gained
                if order and len(holds[order[-1]]) > len(gained):
                    _insert(order, number, holds)
                    continue
            page = self._pages[number]
            more = 0 if page.base.key in steps_of else page.steps
            if sum(steps_of.values()) + more > steps_max:
                continue
            steps_of[page.base.key] = page.steps
            covered |= gained
            chosen.append(number)
        return chosen

    def _index_new_pages(self) -> None:
        places = self._places
        for number in range(self._indexed, len(self._pages)):
            for piece in _pieces(self._pages[number].content):
                found = places.setdefault(piece, number)
                if found == number:
                    continue  # the first page with it: nearly all pieces
                if isinstance(found, int):
                    places[piece] = [found, number]
                elif len(found) <= COMMON_PIECE_PAGES:
                    found.append(number)
        self._indexed = len(self._pages)

    def _rare_places(self, piece: int) -> list[int]:
        found = self._places.get(piece)
        if found is None:
            return []
        if isinstance(found, int):
            return [found]
        return found if len(found) <= COMMON_PIECE_PAGES else []


def _insert(order: list[int], number: int, holds: dict[int, set[int]]) -> None:
    """Put `number` back into the ascending `order` by its new gain."""
    low, high, gain = 0, len(order), (len(holds[number]), number)
    while low < high:
        middle = (low + high) // 2
        if (len(holds[order[middle]]), order[middle]) < gain:
            low = middle + 1
        else:
            high = middle
    order.insert(low, number)


def _pieces(data: bytes) -> set[int]:
    digest = xxhash.xxh3_64_intdigest
    low, average, high = PIECE_BYTES
    cuts = cutter(low=low, average=average, high=high)
    return {digest(piece.data) for piece in cuts.cut_buf(data)}
