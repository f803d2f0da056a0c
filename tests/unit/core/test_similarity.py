"""The page index finds the pages that a new chunk repeats, within its bounds."""

import random

from dmsync.core.similarity import PAGES_PER_CHUNK_MAX, PageIndex

PAGE = 8192


def data(seed: int, pages: int) -> bytes:
    return random.Random(seed).randbytes(pages * PAGE)


def test_the_pages_a_chunk_repeats_are_found_and_no_others() -> None:
    index = PageIndex()
    chunks = [data(seed, 16) for seed in range(8)]
    for number, chunk in enumerate(chunks):
        for page in range(16):
            index.add(bytes([number] * 8), 1, chunk, page)
    new = b"header" + chunks[3][5 * PAGE : 6 * PAGE] + data(99, 1) + chunks[6][: PAGE // 2]
    found = {(page.base.key[0], page.base.page) for page in index.similar(new, steps_max=100)}
    assert found == {(3, 5), (6, 0)}


def test_the_best_page_is_the_last() -> None:
    index = PageIndex()
    chunk = data(1, 2)
    index.add(b"a" * 8, 1, chunk, 0)
    index.add(b"b" * 8, 1, chunk, 1)
    new = chunk[: PAGE // 4] + chunk[PAGE:]
    assert [page.base.key for page in index.similar(new, steps_max=9)] == [b"a" * 8, b"b" * 8]


def test_a_page_that_adds_nothing_is_left_out() -> None:
    index = PageIndex()
    chunk = data(2, 1)
    index.add(b"a" * 8, 1, chunk, 0)
    index.add(b"b" * 8, 1, chunk, 0)
    assert len(index.similar(chunk, steps_max=9)) == 1


def test_pieces_in_many_pages_say_nothing() -> None:
    index = PageIndex()
    for number in range(20):
        index.add(bytes([number] * 8), 1, bytes(PAGE), 0)
    assert index.similar(bytes(PAGE), steps_max=100) == []


def test_steps_of_the_chosen_chunks_stay_within_the_bound() -> None:
    index = PageIndex()
    chunk = data(3, 16)
    for page in range(16):
        index.add(bytes([page] * 8), 30, chunk, page)
    assert len(index.similar(chunk, steps_max=100)) == 3
    same = PageIndex()
    for page in range(16):
        same.add(b"k" * 8, 30, chunk, page)
    assert len(same.similar(chunk, steps_max=30)) == 16, "one chunk is read once"


def test_pages_per_chunk_and_in_the_index_are_bounded() -> None:
    chunk = data(4, 64)
    index = PageIndex()
    for page in range(64):
        index.add(b"k" * 8, 1, chunk, page)
    assert len(index.similar(chunk, steps_max=100)) == PAGES_PER_CHUNK_MAX
    small = PageIndex(pages_max=5)
    for page in range(64):
        small.add(b"k" * 8, 1, chunk, page)
    assert len(small) == 5
    assert small.is_full
