"""A receiver believes no file entry: size and content must be what the chunks say."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmsync.core.chunking import SEGMENT_BYTES, FileHasher
from dmsync.core.ids import DotId, Kind, ObjectId
from dmsync.core.objects import Entry, EntryKind, Layout
from dmsync.core.pages import MANIFEST, ZERO_RUN, Child, Page, Span, encode_page, write_manifest
from dmsync.engine.content_checks import check_content
from dmsync.errors import BadObject
from tests.support import sync_stores
from tests.support.sync_stores import Pair, noise

SEGMENT = SEGMENT_BYTES
Make = Callable[[Any], Entry]


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(str(tmp_path))
    yield made
    made.close()


def content_of(data: bytes) -> ObjectId:
    hasher = FileHasher()
    hasher.update(data)
    return hasher.content()


def file_of(writer: Any, parts: list[bytes | int], layout: Layout, **changes: Any) -> Entry:
    """A file cut into `parts` (an int: zeros of that length), and what it claims wrongly."""
    spans, data = [], b""
    for part in parts:
        data += bytes(part) if isinstance(part, int) else part
        if isinstance(part, int):
            spans.append(Span(part, ZERO_RUN))
        else:
            spans.append(Span(len(part), writer.put(Kind.CHUNK, part)))
    entry = Entry(
        b"f",
        EntryKind.FILE,
        0o644,
        size=len(data),
        content=content_of(data),
        layout=layout,
        tree=write_manifest(writer, spans, layout),
    )
    return replace(entry, **changes)


def commit_entry(pair: Pair, monkeypatch: pytest.MonkeyPatch, make: Make) -> DotId:
    """A local dot whose second commit holds the entry that `make` writes."""
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"f": noise(3 * SEGMENT)})
    pair.push(dot)
    write = sync_stores.write_file

    def write_made(objects: Any, writer: Any, name: bytes, data: bytes, old: Any) -> Entry:
        return make(writer) if name == b"f" else write(objects, writer, name, data, old)

    monkeypatch.setattr(sync_stores, "write_file", write_made)
    pair.local.commit(dot, {"f": b"", "g": b"other"})
    return dot


A, B, C = noise(SEGMENT, 1), noise(SEGMENT, 2), noise(1000, 3)

HONEST: dict[str, Make] = {
    "whole segments": lambda w: file_of(w, [A, B], Layout.FIXED),
    "a short last segment": lambda w: file_of(w, [A, B, C], Layout.FIXED),
    "the same chunk twice": lambda w: file_of(w, [A, B, A], Layout.FIXED),
    "a run over segments": lambda w: file_of(w, [A, 3 * SEGMENT, B, 5 * SEGMENT + 7], Layout.FIXED),
    "zeros first": lambda w: file_of(w, [2 * SEGMENT, C], Layout.FIXED),
    "chunks of half a segment": lambda w: file_of(
        w, [A[:65536], A[65536:], B[:65536], C], Layout.FIXED
    ),
    "chunks of two segments": lambda w: file_of(w, [A + B, B + C], Layout.FIXED),
    "content-defined": lambda w: file_of(w, [A[:70_001], B, C, 200_001, A, 9, C], Layout.CDC),
    "one short chunk": lambda w: file_of(w, [C], Layout.FIXED),
}

LYING: dict[str, Make] = {
    "another content": lambda w: file_of(w, [A, B], Layout.FIXED, content=content_of(A + C)),
    "the first chunk's id": lambda w: file_of(w, [A, B], Layout.FIXED, content=content_of(A)),
    "content-defined": lambda w: file_of(w, [A, C, B], Layout.CDC, content=content_of(A + B + C)),
    "a smaller size": lambda w: file_of(w, [A, B, C], Layout.FIXED, size=2 * SEGMENT),
    "a greater size": lambda w: file_of(w, [A, B, C], Layout.FIXED, size=2 * SEGMENT + 2000),
    "zeros only": lambda w: file_of(w, [3 * SEGMENT], Layout.FIXED),
    "zeros without end": lambda w: replace(
        file_of(w, [A], Layout.FIXED),
        size=2**61 + SEGMENT,
        tree=write_manifest(
            w, [Span(2**61, ZERO_RUN), Span(SEGMENT, w.put(Kind.CHUNK, A))], Layout.FIXED
        ),
    ),
    "a chunk shorter than its span": lambda w: replace(
        file_of(w, [A, B], Layout.FIXED),
        tree=write_manifest(
            w, [Span(SEGMENT, w.put(Kind.CHUNK, A)), Span(1000, w.put(Kind.CHUNK, B))], Layout.FIXED
        ),
        size=SEGMENT + 1000,
        content=content_of(A + B),
    ),
    "one chunk of two lengths": lambda w: replace(
        file_of(w, [A, A], Layout.FIXED),
        tree=write_manifest(
            w, [Span(SEGMENT, w.put(Kind.CHUNK, A)), Span(1000, w.put(Kind.CHUNK, A))], Layout.FIXED
        ),
        size=SEGMENT + 1000,
        content=content_of(A + A),
    ),
    "a single chunk of another length": lambda w: Entry(
        b"f", EntryKind.FILE, 0o644, 0, 0, 0, 999, w.put(Kind.CHUNK, C), Layout.SINGLE
    ),
    "a single chunk of two segments": lambda w: Entry(
        b"f", EntryKind.FILE, 0o644, 0, 0, 0, 2 * SEGMENT, w.put(Kind.CHUNK, A + B), Layout.SINGLE
    ),
    "the old manifest with another content": lambda w: file_of(
        w,
        [noise(3 * SEGMENT)[at : at + SEGMENT] for at in range(0, 3 * SEGMENT, SEGMENT)],
        Layout.FIXED,
        content=content_of(C),
    ),
}


@pytest.mark.parametrize("make", HONEST.values(), ids=HONEST.keys())
def test_a_file_that_adds_up_is_taken(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    dot = commit_entry(pair, monkeypatch, make)
    pair.push(dot)
    assert pair.remote.tip(dot) == pair.local.tip(dot)


@pytest.mark.parametrize("make", LYING.values(), ids=LYING.keys())
def test_a_push_of_a_file_that_lies_is_refused_and_nothing_moves(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, make: Make
) -> None:
    dot = commit_entry(pair, monkeypatch, make)
    before = pair.remote.tip(dot), pair.remote.objects(dot).packs()
    error = pair.try_push(dot).error
    assert isinstance(error, BadObject), error
    assert (pair.remote.tip(dot), pair.remote.objects(dot).packs()) == before


@pytest.mark.parametrize("name", ["another content", "a chunk shorter than its span"])
def test_a_clone_of_a_file_that_lies_is_refused(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    pair.local, pair.remote = pair.remote, pair.local
    pair.remote.add_remote("upstream")
    dot = pair.remote.create_dot()
    monkeypatch.setattr(sync_stores, "write_file", lambda objects, writer, *_: LYING[name](writer))
    pair.remote.commit(dot, {"f": b""})
    assert isinstance(pair.try_clone().error, BadObject)
    assert pair.local.catalog.dot(dot) is None


def test_a_file_in_fixed_layout_is_checked_without_reading_it(pair: Pair) -> None:
    dot = pair.local.create_dot()
    objects = pair.local.objects(dot)
    with objects.writer() as writer:
        entry = file_of(writer, [A, 3 * SEGMENT, B, C], Layout.FIXED)
        writer.seal()

    class PagesOnly:
        def read_page(self, page: ObjectId) -> bytes:
            return objects.read_page(page)

        def read(self, kind: Kind, oid: ObjectId) -> bytes:
            raise AssertionError("a chunk was read")

    for _ in check_content(PagesOnly(), entry):
        pass


def test_a_tower_of_repeated_pages_is_walked_once(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,024 to the power of 7 times the same leaf."""

    def tower(writer: Any) -> Entry:
        spans = tuple([Span(1, writer.put(Kind.CHUNK, b"x"))] * 1024)
        page = writer.write_page(encode_page(Page(MANIFEST, 0, spans)), None)
        for level in range(1, 8):
            children = tuple([Child(b"", page, 1024)] * 1024)
            page = writer.write_page(encode_page(Page(MANIFEST, level, children)), None)
        return Entry(
            b"f", EntryKind.FILE, 0o644, 0, 0, 0, 4096, content_of(b"x" * 4096), Layout.CDC, page
        )

    dot = commit_entry(pair, monkeypatch, tower)
    assert isinstance(pair.try_push(dot).error, BadObject)
