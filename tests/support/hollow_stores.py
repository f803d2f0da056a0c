"""Stores that lack the content of some commits for real, as after pruning and sweeping."""

import os
import shutil
import tempfile
from collections.abc import Iterable

from dmsync.core.events import CommitsThinned
from dmsync.core.ids import DotId, Kind, ObjectId
from dmsync.core.objects import commit_from_bytes
from dmsync.engine.sync_objects import ObjectSet, RootComparison
from dmsync.storage.object_store import ObjectStore
from tests.support.sync_stores import FakeStore


def all_commits(store: FakeStore, dot: DotId) -> list[ObjectId]:
    """Every commit of the only dot, parents first."""
    rows = store.catalog._rows("SELECT id FROM commits ORDER BY generation, id")
    return [ObjectId(row[0]) for row in rows]


def complete_commits(store: FakeStore, dot: DotId) -> set[ObjectId]:
    return set(all_commits(store, dot)).difference(store.catalog.hollow_commits(dot))


def drop_content(store: FakeStore, dot: DotId, commits: Iterable[ObjectId]) -> None:
    """Thin commits and lose every object that no complete commit needs."""
    store.append(CommitsThinned(dot, tuple(commits), "test"))
    sweep(store, dot)


def sweep(store: FakeStore, dot: DotId) -> None:
    """Write the dot's packs anew with all commits' records and the complete ones' content."""
    objects = store.objects(dot)
    kept = complete_commits(store, dot)
    directory = objects.dot_dir
    with tempfile.TemporaryDirectory() as scratch:
        fresh_dir = os.path.join(scratch, os.path.basename(directory))
        with ObjectStore(fresh_dir) as fresh, fresh.writer() as writer:
            for commit in all_commits(store, dot):
                payload = objects.read_commit(commit)
                writer.put(Kind.COMMIT, payload)
                if commit not in kept:
                    continue
                root = commit_from_bytes(payload).root
                comparison = RootComparison(objects, None, root, ObjectSet(), trusted=True)
                for _ in comparison.steps():
                    pass
                for chunk in comparison.added.chunks:
                    writer.put(Kind.CHUNK, objects.read(Kind.CHUNK, chunk))
                for page in comparison.added.pages:
                    writer.put(Kind.PAGE, objects.read(Kind.PAGE, page))
            writer.seal()
        objects.close()
        store._objects.pop(dot)
        for name in ("packs", "index.sqlite", "index.sqlite-wal", "index.sqlite-shm"):
            path = os.path.join(directory, name)
            if os.path.isdir(path):
                shutil.rmtree(path)
            elif os.path.exists(path):
                os.unlink(path)
        shutil.copytree(os.path.join(fresh_dir, "packs"), os.path.join(directory, "packs"))
