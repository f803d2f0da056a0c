"""States of an object made page by page, and pages shared by many objects: the bytes that laying
whole patches over whole objects gives."""

import random
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest

from dmsync.core.delta import changed_pages, compress, compress_with_prefix, select_pages
from dmsync.core.ids import Kind
from dmsync.core.records import BaseSlice, Encoding, Record, decode_record, pages_bitmap
from dmsync.errors import BadObject
from dmsync.storage import shared_pages
from dmsync.storage.patched_content import PatchedContent, touching
from dmsync.storage.shared_pages import Chain, SharedPages, patch_pages

ROOT = b"root key"


def states_of(seed: int, size: int, count: int) -> list[bytes]:
    source = random.Random(seed)
    states = [source.randbytes(size)]
    for _ in range(count):
        new = bytearray(states[-1])
        for _ in range(source.randint(1, 3)):
            at = source.randrange(size)
            new[at : at + 5] = source.randbytes(len(new[at : at + 5]))
        states.append(bytes(new))
    return states


def patch(old: bytes, new: bytes, key: bytes) -> Record:
    pages = changed_pages(old, new)
    frame = compress_with_prefix(select_pages(new, pages), select_pages(old, pages), 6)
    bases = (BaseSlice(key),)
    return Record(Kind.CHUNK, Encoding.PATCH, len(new), frame, bases, pages_bitmap(pages))


def chain_of(states: list[bytes]) -> Chain:
    first = Record(Kind.CHUNK, Encoding.ZSTD, len(states[0]), compress(states[0]))
    deltas = [patch(old, new, ROOT) for old, new in pairwise(states)]
    return Chain(ROOT, first, deltas[::-1])


@pytest.mark.parametrize("size", [1, 4096, 5000, 12_288, 131_072, 130_000])
def test_each_state_is_what_patches_of_the_whole_give(size: int) -> None:
    states = states_of(size, size, 12)
    content, whole = PatchedContent(states[0]), states[0]
    assert content.joined() == whole
    for number, record in enumerate(reversed(chain_of(states).deltas), 1):
        content.replace(content.decoded(record))
        whole = decode_record(record, [whole])
        assert content.joined() == whole == states[number]
        for page in range(-(-size // 8192)):
            assert content.similar_page(page) == whole[page * 8192 : (page + 1) * 8192]
        with pytest.raises(BadObject):
            content.similar_page(-(-size // 8192))


def test_a_patch_of_another_length_or_behind_the_end_is_refused() -> None:
    content = PatchedContent(bytes(8192))
    frame = compress(bytes(4096))
    for raw_bytes, changed in ((8193, 1), (8192, 4), (4096, 1)):
        record = Record(Kind.CHUNK, Encoding.PATCH, raw_bytes, frame, (BaseSlice(ROOT),), changed)
        with pytest.raises(BadObject):
            content.decoded(record)


@pytest.mark.parametrize("held", ["plain", "compressed"])
@pytest.mark.parametrize("threads", [0, 2])
def test_shared_pages_are_those_of_the_whole_bases(monkeypatch, held: str, threads: int) -> None:
    if held == "compressed":
        monkeypatch.setattr(shared_pages, "HELD_PLAIN_BYTES_MAX", 0)
    monkeypatch.setattr(shared_pages, "_STARTS_OF_JOB", 2)
    source = random.Random(threads)
    shared = SharedPages()
    contents: dict[bytes, bytes] = {}
    chains: list[tuple[bytes, Chain]] = []
    slices: list[BaseSlice] = []
    for number in range(9):
        states = states_of(number, 40_000 + number * 1000, 10)
        whole = chain_of(states)
        for state in source.sample(range(1, 11), 4):
            key = bytes((number, state)) * 4
            root = bytes((number,)) * 8
            chains.append((key, Chain(root, whole.first, whole.deltas[10 - state :])))
            contents[key] = states[state]
            slices += [BaseSlice(key, page) for page in source.sample(range(5), 2)]
    shared.want(slices + slices[:5])
    assert len(shared) == len(slices)
    if threads:
        with ThreadPoolExecutor(threads) as pool:
            assert shared.take(chains, pool)
    else:
        assert shared.take(chains, None)
    for _ in range(50):
        some = source.sample(slices, 6)
        expected = b"".join(contents[s.key][s.page * 8192 : (s.page + 1) * 8192] for s in some)
        steps = {key: 1 + len(chain.deltas) for key, chain in chains}
        assert b"".join(shared.page(one) or b"" for one in some) == expected
        assert all(shared.steps(one.key) == steps[one.key] for one in some)
    assert shared.page(BaseSlice(b"not held", 0)) is None


def test_what_is_odd_is_left_to_others(monkeypatch) -> None:
    states = states_of(1, 40_000, 4)
    chain = chain_of(states)
    damaged = Record(Kind.CHUNK, Encoding.ZSTD, 40_000, b"no frame")
    prefix = Record(Kind.CHUNK, Encoding.PREFIX, 40_000, b"", (BaseSlice(ROOT),))
    shared = SharedPages()
    keys = [bytes([letter]) * 8 for letter in b"abcd"]
    shared.want([BaseSlice(key, 1) for key in keys] + [BaseSlice(b"elsewhere", 0)])
    assert not shared.take(
        [
            (keys[0], chain),
            (keys[1], Chain(keys[1], damaged, chain.deltas)),
            (keys[2], Chain(keys[2], chain.first, [prefix, *chain.deltas])),
            (keys[3], Chain(keys[3], chain.first, chain.deltas[:1])),
        ],
        None,
    )
    held = [key for key in keys if shared.page(BaseSlice(key, 1)) is not None]
    # The last one decodes to wrong bytes or to none: who uses them compares the hash.
    assert held in ([keys[0]], [keys[0], keys[3]])
    assert touching([prefix], 1) is None

    monkeypatch.setattr(shared_pages, "HELD_BYTES_MAX", 0)
    full = SharedPages()
    full.want([BaseSlice(keys[0], 1)])
    assert not full.take([(keys[0], chain)], None)
    assert full.page(BaseSlice(keys[0], 1)) is None


def test_the_pages_of_8_kib_are_pairs_of_4_kib() -> None:
    assert patch_pages([0, 2]) == 0b110011
