"""fsck: wrong content ids are found, and two runs leave each other's scratch alone."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dmsync.core.ids import Kind
from dmsync.core.objects import Entry, EntryKind, Layout
from dmsync.core.pages import Span, write_manifest
from dmsync.engine.fsck import FsckReport, fsck
from dmsync.engine.settings import EngineSettings
from dmsync.engine.store import Store
from tests.support import sync_stores
from tests.support.sync_stores import FakeStore, noise


def checked(home: str, *, full: bool = True) -> FsckReport:
    settings = EngineSettings(author="a", actor="a", lock_wait_s=2)
    with Store.open(home, settings) as store:
        return fsck(store, full=full)


def changed_writer(name: bytes, **changes: Any) -> Any:
    """write_file that lets one file's entry say something else."""
    write = sync_stores.write_file

    def write_changed(
        objects: Any, writer: Any, given: bytes, data: bytes, old: Entry | None
    ) -> Entry:
        entry = write(objects, writer, given, data, old)
        return replace(entry, **changes) if given == name else entry

    return write_changed


@pytest.mark.parametrize("size", [200_000, 131_072 * 3])
def test_a_wrong_content_id_is_found_and_the_commit_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    home = str(tmp_path / "home")
    store = FakeStore(home)
    dot = store.create_dot()
    store.commit(dot, {"a": noise(size), "b": noise(size, 1)})
    assert checked(home).problems == []
    monkeypatch.setattr(sync_stores, "write_file", changed_writer(b"b", content=bytes(32)))
    commit = store.commit(dot, {"a": noise(size), "b": noise(size, 2)})
    assert checked(home, full=False).problems == []
    (problem,) = checked(home).problems
    assert "'b'" in problem.message and "content id" in problem.message
    assert problem.commits == (commit.hex(),)
    store.close()


def test_a_chunk_that_is_not_as_long_as_its_span_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = str(tmp_path / "home")
    store = FakeStore(home)
    dot = store.create_dot()

    def write_lying(objects: Any, writer: Any, name: bytes, data: bytes, old: Any) -> Entry:
        spans = [Span(1000, writer.put(Kind.CHUNK, data))]
        tree = write_manifest(writer, spans, Layout.FIXED)
        content = spans[0].chunk
        return Entry(name, EntryKind.FILE, 0o644, 0, 0, 0, 1000, content, Layout.FIXED, tree)

    monkeypatch.setattr(sync_stores, "write_file", write_lying)
    commit = store.commit(dot, {"a": noise(999)})
    (problem,) = checked(home).problems
    assert "not as long as its span" in problem.message
    assert problem.commits == (commit.hex(),)
    store.close()


def test_a_log_that_lost_its_end_is_a_problem_until_it_is_confirmed(tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    store = FakeStore(home)
    dot = store.create_dot()
    store.commit(dot, {"a": noise(100)})
    store.close()
    log_file = tmp_path / "home" / "events" / "00000001.log"
    os.truncate(log_file, log_file.stat().st_size - 5)
    for _ in range(2):
        (problem,) = checked(home).problems
        assert problem.where == "events" and "1 operation since" in problem.message
    log_file.with_name("lost-end").unlink()
    assert checked(home).problems == []
