"""Similar pages that many chunks are read with, each base's chain walked once for all of them.

Chunks of a write-ahead log have single pages of thousands of other chunks as prefix, and the same
chunks, in the same state or in another one, serve their neighbours. So all pages that a window
needs of the chains that begin with one frame are taken while that is decoded, and only they are
kept. Unverified: what is decoded with them is. Whatever is odd is left out, and whoever needs it
walks its chain alone.
"""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import zstandard

from dmsync.core.delta import PATCH_PAGE_BYTES, decompress
from dmsync.core.records import SIMILAR_PAGE_BYTES, BaseSlice, Record, decode_record
from dmsync.errors import BadObject
from dmsync.storage.patched_content import Pages, PatchedContent, touching

if TYPE_CHECKING:
    from concurrent.futures import Executor

HELD_PLAIN_BYTES_MAX: Final = 8 * 1024 * 1024
"""Pages of a window that takes more are held compressed: 15 us for both ways."""
HELD_BYTES_MAX: Final = 32 * 1024 * 1024
"""Pages beyond are not held."""
_HELD_LEVEL: Final = -1
_STARTS_OF_JOB: Final = 64
_RATIO: Final = SIMILAR_PAGE_BYTES // PATCH_PAGE_BYTES
_PATCH_PAGES: Final = (1 << _RATIO) - 1
"""The bits of the patch pages in the first similar page."""


class Start(Protocol):
    """What was decoded before and chains begin with."""

    @property
    def data(self) -> bytes: ...
    @property
    def steps(self) -> int: ...


class Chain(NamedTuple):
    """How a base is made: its deltas, the last one first, and the key of what each is laid over."""

    first_key: bytes
    first: Record | Start
    deltas: Sequence[Record]


class _Wanted(NamedTuple):
    key: bytes
    pages: list[int]
    chain: Chain


class _Held(NamedTuple):
    """The content of a page, or a frame of it, which is shorter."""

    held: bytes
    length: int

    @property
    def content(self) -> bytes:
        return self.held if len(self.held) == self.length else decompress(self.held, self.length)


def patch_pages(similar: Iterable[int]) -> int:
    """The 4 KiB pages, as bits, that some 8 KiB pages consist of."""
    bits = 0
    for page in similar:
        bits |= _PATCH_PAGES << page * _RATIO
    return bits


class SharedPages:
    """The pages that some records name, held. Filled by one thread (and its jobs), read by any."""

    def __init__(self) -> None:
        self._pages: dict[bytes, set[int]] = {}
        self._count = 0
        self._held: dict[BaseSlice, _Held] = {}
        self._held_bytes = 0
        self._steps: dict[bytes, int] = {}

    def __len__(self) -> int:
        """How many pages are wanted."""
        return self._count

    def want(self, bases: Iterable[BaseSlice]) -> None:
        for base in bases:
            pages = self._pages.setdefault(base.key, set())
            self._count += base.page not in pages
            pages.add(base.page)

    def keys(self) -> Iterable[bytes]:
        """The bases that pages are wanted of."""
        return self._pages.keys()

    def take(self, chains: Iterable[tuple[bytes, Chain]], pool: "Executor | None") -> bool:
        """Decode the bases that have these keys and hold the pages wanted of them. True when all
        are held."""
        starts: dict[bytes, list[_Wanted]] = {}
        for key, chain in chains:
            wanted = _Wanted(key, sorted(self._pages[key]), chain)
            starts.setdefault(chain.first_key, []).append(wanted)
        is_plain = self._count * SIMILAR_PAGE_BYTES <= HELD_PLAIN_BYTES_MAX
        groups = list(starts.values())
        parts = [groups[at : at + _STARTS_OF_JOB] for at in range(0, len(groups), _STARTS_OF_JOB)]
        if pool is None or len(parts) < 2:
            for part in parts:
                self._take(part, is_plain=is_plain)
        else:
            for job in [pool.submit(self._take, part, is_plain=is_plain) for part in parts]:
                job.result()
        return len(self._held) == self._count

    def page(self, base: BaseSlice) -> bytes | None:
        """The content of a page; None when it is not held."""
        page = self._held.get(base)
        return None if page is None else page.content

    def steps(self, key: bytes) -> int:
        """What reading a base takes of which a page is held."""
        return self._steps[key]

    def _take(self, starts: Sequence[Sequence[_Wanted]], *, is_plain: bool) -> None:
        compressor = None if is_plain else zstandard.ZstdCompressor(level=_HELD_LEVEL)
        for alike in starts:
            if self._held_bytes >= HELD_BYTES_MAX:
                return
            try:
                self._take_alike(alike, compressor)
            except BadObject:
                continue

    def _take_alike(
        self, alike: Sequence[_Wanted], compressor: zstandard.ZstdCompressor | None
    ) -> None:
        """Hold pages of bases whose chains begin with one frame. Raises BadObject."""
        first = alike[0].chain.first
        if isinstance(first, Record):
            data, steps = decode_record(first, ()), 1
        else:
            data, steps = first.data, first.steps
        decoded: dict[int, Pages] = {}
        for key, pages, chain in alike:
            kept = touching(chain.deltas, patch_pages(pages))
            if kept is None:
                continue
            state = PatchedContent(data)
            for record in reversed(kept):
                # One record is one object for all chains of a window.
                replaced = decoded.get(id(record))
                if replaced is None:
                    decoded[id(record)] = replaced = state.decoded(record)
                state.replace(replaced)
            self._steps[key] = steps + len(chain.deltas)
            for page in pages:
                self._hold(BaseSlice(key, page), state.similar_page(page), compressor)

    def _hold(
        self, base: BaseSlice, content: bytes, compressor: zstandard.ZstdCompressor | None
    ) -> None:
        held = content
        if compressor is not None:
            frame = compressor.compress(content)
            if len(frame) < len(content):
                # A copy: what the compressor made was longer first, and its end would stay a hole
                # among the frames held that is too small for the next one.
                held = bytes(memoryview(frame))
        self._held[base] = _Held(held, len(content))
        self._held_bytes += len(held)
