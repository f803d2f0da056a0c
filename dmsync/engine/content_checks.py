"""Checks that a recorded file is what its entry says: nothing of it is believed before.

By the manifest alone where that can be: aligned chunks of a segment count by their ids.
"""

from collections.abc import Generator, Iterable, Iterator
from typing import Final

from dmsync.core.chunking import SEGMENT_BYTES, FileHasher
from dmsync.core.ids import Kind
from dmsync.core.objects import HOLES_BYTES_MAX, Entry, Layout
from dmsync.core.pages import CHUNK_BYTES_MAX, MANIFEST, ZERO_RUN, Child, Span, read_page
from dmsync.engine.file_content import ChunkReader
from dmsync.errors import BadObject

SPANS_PER_STEP: Final = 256
"""Spans that checking a file takes in one step: at most so many chunks are read in it."""
_ZEROS_PER_STEP: Final = 1 << 38
_ALIGNED_BYTES: Final = 4096
"""What the only chunk of a file in fixed layout lies at a multiple of when it is the last one: how
long the others would be is not known."""


def check_content(reader: ChunkReader, entry: Entry) -> Generator[None, None, None]:
    """Check in small steps that a file entry's size and content are what its chunks say, and that
    its spans lie as its layout says.

    Aligned chunks of a segment count by their ids alone, so that a file in fixed layout is not
    read; others are, one chunk at a time. That a chunk is as long as its span is for the caller
    to check where the chunk is not read.

    Raises:
        BadObject: they are not. ObjectMissing, HashMismatch: a page or chunk cannot be read.
    """
    check_size(entry)
    if entry.tree is None:
        return  # decoding an entry checks all else there is
    hasher = FileHasher()
    zeros = 0
    for number, span in enumerate(_as_laid_out(_weighed_spans(reader, entry), entry)):
        if number % SPANS_PER_STEP == 0:
            yield
        if span.chunk == ZERO_RUN:
            zeros += span.length
            if zeros == entry.size:
                raise BadObject("a file of zeros only has a manifest")
            _check_zeros(zeros)
            for length in _in_steps(span.length):
                hasher.add_zeros(length)
                yield
        elif hasher.is_aligned and _is_segment(span, entry.size - hasher.size):
            hasher.add_segment_hash(span.chunk, span.length)
        else:
            hasher.update(_chunk_of(reader, span))
    if hasher.content() != entry.content:
        raise BadObject("a file's content id is not what its chunks say")


def check_size(entry: Entry) -> None:
    """Refuse a size that the layout cannot have. Raises BadObject."""
    if entry.layout is Layout.SINGLE and entry.size > SEGMENT_BYTES:
        raise BadObject(f"a file of {entry.size} bytes is no single segment")
    if entry.layout is Layout.ZERO:
        _check_zeros(entry.size)


def _weighed_spans(reader: ChunkReader, entry: Entry) -> Iterator[Span]:
    """The spans of a manifest whose pages weigh what they say: readers pass over them by that."""
    assert entry.tree is not None
    root = Child(b"", entry.tree, entry.size)
    stack: list[tuple[Iterator[Child], int]] = [(iter((root,)), -1)]
    while stack:
        children, level = stack[-1]
        child = next(children, None)
        if child is None:
            stack.pop()
            continue
        page = read_page(reader, child.page, MANIFEST)
        if level >= 0 and page.level != level - 1:
            raise BadObject("page levels do not descend by one")
        is_leaf = page.level == 0
        if sum(item.length if is_leaf else item.weight for item in page.items) != child.weight:
            raise BadObject("a manifest's spans do not add up to its file's size")
        if is_leaf:
            yield from page.items
        else:
            stack.append((iter(page.items), page.level))


def _as_laid_out(spans: Iterable[Span], entry: Entry) -> Iterator[Span]:
    """The same spans: runs of zeros are maximal, chunks of a FIXED file have one size but for the
    last, and each lies at a multiple of it."""
    offset = chunk_bytes = 0
    is_after_zeros = False
    for span in spans:
        is_zeros = span.chunk == ZERO_RUN
        if is_zeros and is_after_zeros:
            raise BadObject("runs of zeros are not maximal")
        is_after_zeros = is_zeros
        if entry.layout is Layout.FIXED and not is_zeros:
            is_last = offset + span.length == entry.size
            if not chunk_bytes and not is_last:
                chunk_bytes = span.length
            is_whole = span.length == chunk_bytes or (
                is_last and span.length <= (chunk_bytes or CHUNK_BYTES_MAX)
            )
            if not is_whole or offset % (chunk_bytes or _ALIGNED_BYTES):
                raise BadObject("a chunk of a file in fixed layout does not lie where it should")
        offset += span.length
        yield span


def _is_segment(span: Span, left: int) -> bool:
    """Is the span, which begins a segment, the whole of it, `left` bytes before the file's end?"""
    return span.length == min(SEGMENT_BYTES, left)


def _check_zeros(zeros: int) -> None:
    if zeros > HOLES_BYTES_MAX:
        raise BadObject(f"a file with more than {HOLES_BYTES_MAX} bytes of holes")


def _in_steps(length: int) -> Iterator[int]:
    """A run of zeros in parts that are hashed within milliseconds."""
    while length > _ZEROS_PER_STEP:
        yield _ZEROS_PER_STEP
        length -= _ZEROS_PER_STEP
    yield length


def _chunk_of(reader: ChunkReader, span: Span) -> bytes:
    data = reader.read(Kind.CHUNK, span.chunk)
    if len(data) != span.length:
        raise BadObject("a chunk is not as long as its span")
    return data
