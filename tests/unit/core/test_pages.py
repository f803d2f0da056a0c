"""Page trees: round trips, stable cuts, differences that read only what differs."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dmsync.core.encoding import encode
from dmsync.core.ids import ObjectId
from dmsync.core.objects import Entry, EntryKind, Layout
from dmsync.core.pages import (
    DIRECTORY,
    MANIFEST,
    PAGE_BYTES_MAX,
    ZERO_RUN,
    PageBases,
    Span,
    decode_page,
    differing_items,
    directory_entries,
    file_spans,
    find_entry,
    write_directory,
    write_manifest,
)
from dmsync.errors import BadObject
from tests.support.page_memory import PageMemory

CHUNK = 128 * 1024


def fifo(name: bytes, mode: int = 0o600) -> Entry:
    return Entry(name, EntryKind.FIFO, mode)


def names(count: int) -> list[bytes]:
    return sorted(b"name-%d" % n for n in range(count))


def spans(count: int, seed: int = 1) -> list[Span]:
    source = random.Random(seed)
    return [Span(CHUNK, ObjectId(source.randbytes(32))) for _ in range(count)]


@settings(max_examples=50, deadline=None)
@given(st.sets(st.binary(min_size=1, max_size=40).filter(lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b"..")), max_size=300))  # fmt: skip
def test_directory_round_trips(found: set[bytes]) -> None:
    memory = PageMemory()
    entries = [fifo(name) for name in sorted(found)]
    root = write_directory(memory, entries)
    assert list(directory_entries(memory, root)) == entries
    for entry in entries[:5]:
        assert find_entry(memory, root, entry.name) == entry
    assert find_entry(memory, root, b"not there") is None


def test_one_changed_entry_of_100000_rewrites_a_path_of_small_pages() -> None:
    memory = PageMemory()
    entries = [fifo(name) for name in names(100_000)]
    old = write_directory(memory, entries)
    before = set(memory.pages)
    entries[50_000] = fifo(entries[50_000].name, 0o640)
    memory.reads = 0
    new = write_directory(memory, entries, PageBases(memory, old, DIRECTORY))
    added = set(memory.pages) - before
    assert sum(len(memory.pages[page]) for page in added) < 120_000
    memory.reads = 0
    gone, come, pages = differing_items(memory, old, new, DIRECTORY)
    assert memory.reads < 20
    assert set(come) - set(gone) == {entries[50_000]}
    assert set(pages) == added and pages[-1] == new


def test_inserted_name_moves_no_other_page() -> None:
    memory = PageMemory()
    entries = [fifo(name) for name in names(20_000)]
    old = write_directory(memory, entries)
    new = write_directory(memory, sorted([*entries, fifo(b"name-5000x")], key=lambda e: e.name))
    _, _, pages = differing_items(memory, old, new, DIRECTORY)
    assert len(pages) <= 4


@pytest.mark.parametrize("layout", [Layout.FIXED, Layout.CDC])
def test_manifest_round_trips_and_one_change_costs_a_path(layout: Layout) -> None:
    memory = PageMemory()
    cut = spans(5_000)
    cut[10] = Span(7 * CHUNK, ZERO_RUN)
    old = write_manifest(memory, cut, layout)
    size = sum(span.length for span in cut)
    entry = Entry(b"f", EntryKind.FILE, 0, size=size, content=bytes(32), layout=layout, tree=old)
    assert list(file_spans(memory, entry)) == cut
    cut[3_000] = spans(1, seed=2)[0]
    new = write_manifest(memory, cut, layout, PageBases(memory, old, MANIFEST))
    gone, come, pages = differing_items(memory, old, new, MANIFEST)
    assert set(come) - set(gone) == {cut[3_000]}
    assert len(pages) <= 4
    assert all(len(page) <= PAGE_BYTES_MAX for page in memory.pages.values())


def test_manifest_that_does_not_add_up_is_refused() -> None:
    memory = PageMemory()
    tree = write_manifest(memory, spans(3), Layout.FIXED)
    for size in (3 * CHUNK - 1, 3 * CHUNK + 1):
        entry = Entry(
            b"f", EntryKind.FILE, 0, size=size, content=bytes(32), layout=Layout.FIXED, tree=tree
        )
        with pytest.raises(BadObject):
            list(file_spans(memory, entry))


@pytest.mark.parametrize(
    "value",
    [
        (1, 0, ()), (1, 9, ()), (3, 0, ()), (1, 0, (fifo(b"b").to_value(), fifo(b"a").to_value())),
        (1, 0, (fifo(b"a").to_value(), fifo(b"a").to_value())), (1, 0, (Entry(b"", EntryKind.FIFO, 0).to_value(),)),
        (2, 0, ((1,), bytes(31))), (2, 0, ((0,), bytes(32))), (2, 0, ((2**20 + 1,), b"\1" * 32)), (2, 0, ((), b"")),
        (1, 1, ((b"a", bytes(31), 1),)), (1, 1, ((b"b", bytes(32), 1), (b"a", bytes(32), 1))), (2, 1, ((b"a", bytes(32), 1),)),
        (2, 1, ((b"", bytes(32), 0),)),
    ],
)  # fmt: skip
def test_bad_page_is_refused(value: tuple[object, ...]) -> None:
    with pytest.raises(BadObject):
        decode_page(encode(value), DIRECTORY if value[0] != 2 else MANIFEST)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_with_a_typed_error(data: bytes) -> None:
    for page_type in (DIRECTORY, MANIFEST):
        try:
            decode_page(data, page_type)
        except BadObject:
            pass
