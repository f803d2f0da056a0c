"""The bound on differing bytes: never below the truth, close to it, and cheap."""

import random
from pathlib import Path

import pytest

from dmsync.core.chunking import FIXED_CHUNK_BYTES
from dmsync.core.objects import Entry, EntryKind
from dmsync.core.pages import find_path
from dmsync.engine.differing_bytes import differing_bytes
from tests.support.live_tree import SUBDOT, LiveTree
from tests.support.memory_store import MemoryStore

MEBIBYTE = 1024 * 1024


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def tree(tmp_path: Path, store: MemoryStore) -> LiveTree:
    return LiveTree(tmp_path / "tree", store)  # type: ignore[arg-type]


def captured(tree: LiveTree, store: MemoryStore, content: bytes) -> Entry:
    (tree.path / "f").write_bytes(content)
    entry = find_path(store, tree.capture().root, SUBDOT + b"/f")
    assert entry is not None
    return entry


def sparse(tree: LiveTree, store: MemoryStore, size: int, at: dict[int, bytes]) -> Entry:
    with open(tree.path / "f", "r+b" if (tree.path / "f").exists() else "wb") as out:
        out.truncate(size)
        for offset, data in at.items():
            out.seek(offset)
            out.write(data)
    entry = find_path(store, tree.capture().root, SUBDOT + b"/f")
    assert entry is not None
    return entry


def test_a_large_file_with_one_changed_page(tree: LiveTree, store: MemoryStore) -> None:
    size = 1024 * MEBIBYTE
    data = {offset: b"%d" % offset for offset in range(0, size, 16 * MEBIBYTE)}
    old = sparse(tree, store, size, data)
    new = sparse(tree, store, size, {500 * MEBIBYTE + 5: b"page"})
    store.reads = 0
    assert differing_bytes(store, old, new) == FIXED_CHUNK_BYTES
    assert store.reads <= 4, "equal pages are passed over"
    assert differing_bytes(store, new, old) == FIXED_CHUNK_BYTES
    assert differing_bytes(store, old, old) == 0


def test_bytes_put_in_count_where_the_cuts_follow_the_content(
    tree: LiveTree, store: MemoryStore
) -> None:
    content = random.Random(1).randbytes(4 * MEBIBYTE + 1)
    old = captured(tree, store, content)
    new = captured(tree, store, content[: 2 * MEBIBYTE] + b"more" + content[2 * MEBIBYTE :])
    assert 4 <= differing_bytes(store, old, new) <= MEBIBYTE


def test_the_bound_holds_for_random_changes(tree: LiveTree, store: MemoryStore) -> None:
    source = random.Random(2)
    chunk = FIXED_CHUNK_BYTES
    for _ in range(25):
        before = [source.choice((bytes(chunk), b"a" * chunk, b"b" * chunk)) for _ in range(9)]
        after = [source.choice((bytes(chunk), b"a" * chunk, old)) for old in before]
        after = after[: source.randrange(1, 10)]
        old = captured(tree, store, b"".join(before))
        new = captured(tree, store, b"".join(after))
        wrong = sum(chunk for was, now in zip(before, after, strict=False) if was != now)
        cut = chunk * (len(before) - len(after))
        assert differing_bytes(store, old, new) == wrong + cut


def test_what_is_new_or_gone_differs_wholly(tree: LiveTree, store: MemoryStore) -> None:
    entry = captured(tree, store, b"seven b")
    link = Entry(b"l", EntryKind.SYMLINK, 0o777, link_target=b"f")
    assert differing_bytes(store, None, entry) == differing_bytes(store, entry, None) == 7
    assert differing_bytes(store, link, entry) == 7
    assert differing_bytes(store, None, link) == 0
