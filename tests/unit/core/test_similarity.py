"""The page index finds the pages that a new chunk repeats, within its bounds."""

import random

from dmsync.core.similarity import PAGES_PER_CHUNK_MAX, PageIndex

PAGE = 8192


def data(seed: int, pages: int) -> bytes:
    return random.Random(seed).randbytes(pages * PAGE)


def page_of(chunk: bytes, page: int) -> bytes:
    return chunk[page * PAGE : (page + 1) * PAGE]


def test_the_pages_a_chunk_repeats_are_found_and_no_others() -> None:
    index = PageIndex()
    chunks = [data(seed, 16) for seed in range(8)]
    for number, chunk in enumerate(chunks):
        for page in range(16):
            index.add(bytes([number] * 8), 1, page, page_of(chunk, page))
    new = b"header" + chunks[3][5 * PAGE : 6 * PAGE] + data(99, 1) + chunks[6][: PAGE // 2]
    found = {(page.base.key[0], page.base.page) for page in index.similar(new, steps_max=100)}
    assert found == {(3, 5), (6, 0)}


def test_the_best_page_is_the_last() -> None:
    index = PageIndex()
    chunk = data(1, 2)
    index.add(b"a" * 8, 1, 0, page_of(chunk, 0))
    index.add(b"b" * 8, 1, 1, page_of(chunk, 1))
    new = chunk[: PAGE // 4] + chunk[PAGE:]
    assert [page.base.key for page in index.similar(new, steps_max=9)] == [b"a" * 8, b"b" * 8]


def test_a_page_that_adds_nothing_is_left_out() -> None:
    index = PageIndex()
    chunk = data(2, 1)
    index.add(b"a" * 8, 1, 0, page_of(chunk, 0))
    index.add(b"b" * 8, 1, 0, page_of(chunk, 0))
    assert len(index.similar(chunk, steps_max=9)) == 1


def test_pieces_in_many_pages_say_nothing() -> None:
    index = PageIndex()
    for number in range(20):
        index.add(bytes([number] * 8), 1, 0, page_of(bytes(PAGE), 0))
    assert index.similar(bytes(PAGE), steps_max=100) == []


def test_steps_of_the_chosen_chunks_stay_within_the_bound() -> None:
    index = PageIndex()
    chunk = data(3, 16)
    for page in range(16):
        index.add(bytes([page] * 8), 30, page, page_of(chunk, page))
    assert len(index.similar(chunk, steps_max=100)) == 3
    same = PageIndex()
    for page in range(16):
        same.add(b"k" * 8, 30, page, page_of(chunk, page))
    assert len(same.similar(chunk, steps_max=30)) == 16, "one chunk is read once"


def test_pages_per_chunk_and_in_the_index_are_bounded() -> None:
    chunk = data(4, 64)
    index = PageIndex()
    for page in range(64):
        index.add(b"k" * 8, 1, page, page_of(chunk, page))
    assert len(index.similar(chunk, steps_max=100)) == PAGES_PER_CHUNK_MAX
    small = PageIndex(pages_max=5)
    for page in range(64):
        small.add(b"k" * 8, 1, page, page_of(chunk, page))
    assert len(small) == 5
    assert small.is_full


def test_what_is_found_does_not_depend_on_how_pages_are_held() -> None:
    texts = b"".join(f"row {number} of the table\n".encode() for number in range(2000))
    chunk = data(5, 2) + texts[: 3 * PAGE] + data(6, 2)
    found = []
    for index in (PageIndex(), PageIndex(plain_bytes_max=PAGE)):
        for page in range(7):
            index.add(b"k" * 8, 1, page, page_of(chunk, page))
        new = chunk[PAGE // 2 : 4 * PAGE] + chunk[6 * PAGE :]
        pages = index.similar(new, steps_max=9)
        assert all(
            page.content == chunk[page.base.page * PAGE : (page.base.page + 1) * PAGE]
            for page in pages
        )
        found.append([page.base for page in pages])
    assert found[0] == found[1]
    assert len(found[0]) > 3


def test_pages_that_do_not_shrink_are_held_within_the_bound_too() -> None:
    index = PageIndex(plain_bytes_max=0)
    chunk = data(7, 2)
    index.add(b"k" * 8, 1, 1, page_of(chunk, 1))
    assert [page.content for page in index.similar(chunk, steps_max=9)] == [chunk[PAGE:]]
