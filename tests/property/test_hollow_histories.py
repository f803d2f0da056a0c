"""Random histories with random hollow commits in three stores that push and fetch at random."""

import random
import tempfile
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmsync.core.chunking import FIXED_CHUNK_BYTES
from dmsync.core.events import DotCreated
from dmsync.core.ids import DotId, ObjectId
from dmsync.engine.fsck import fsck
from dmsync.errors import ContentAbsent, Diverged, NotFastForward, RevisionNotFound
from tests.support.hollow_stores import all_commits, complete_commits, drop_content
from tests.support.sync_stores import FakeStore, Files, Pair, noise

BRANCHES = ("master", "side", "third")


@dataclass
class World:
    """Three stores and what is true of every commit ever made."""

    stores: list[FakeStore]
    dot: DotId
    rng: random.Random
    pair: Pair
    files: dict[ObjectId, Files] = field(default_factory=dict)
    parents: dict[ObjectId, tuple[ObjectId, ...]] = field(default_factory=dict)
    complete: list[set[ObjectId]] = field(default_factory=lambda: [set(), set(), set()])

    def commit(self, number: int) -> None:
        store, rng = self.stores[number], self.rng
        tips = {row.short_name: row.target for row in store.catalog.branches(self.dot)}
        branch = rng.choice(BRANCHES)
        tip = tips.get(branch)
        base = tip or (rng.choice(sorted(tips.values())) if tips else None)
        data = bytearray(noise(FIXED_CHUNK_BYTES + 5000, rng.randrange(3)))
        data[rng.randrange(20) * 4096 :][:1] = b"x"
        page = rng.randrange(20) * 4096
        data[page : page + 64] = noise(64, rng.randrange(1000))
        files = dict(self.files[base]) if base else {}
        files["db/data"] = bytes(data)
        files[f"d{rng.randrange(3)}/f{rng.randrange(4)}"] = noise(
            rng.randrange(2000), rng.randrange(1 << 30)
        )
        if len(files) > 6:
            del files[rng.choice(sorted(files))]
        parents = [base] if base else []
        other = rng.choice(sorted(tips.values())) if tips else None
        if other and other != base and rng.random() < 0.3:
            parents.append(other)
        message = f"{number}-{rng.random()}"
        made = store.commit(self.dot, files, branch, parents=tuple(parents), message=message)
        self.files[made], self.parents[made] = files, tuple(parents)

    def thin(self, number: int) -> None:
        store = self.stores[number]
        named = {row.target for row in store.catalog.refs(self.dot)}
        free = sorted(complete_commits(store, self.dot) - named)
        chosen = [commit for commit in free if self.rng.random() < 0.5]
        if chosen:
            drop_content(store, self.dot, chosen)
            self.complete[number] -= set(chosen)

    def push(self, here: int, there: int) -> None:
        self._between(here, there)
        if self.stores[here].catalog.branches(self.dot):
            outcome = self.pair.try_push(self.dot, every=True, mode="stash")
            self._judge(outcome.error or outcome.server_error)

    def fetch(self, here: int, there: int) -> None:
        self._between(here, there)
        wishes = self.rng.choice(
            ({}, {}, {"depth": 1}, {"depth": 3}, {"deepen": 2}, {"unshallow": True})
        )
        move = self.rng.choice(("none", "stash", "ff"))
        outcome = self.pair.try_fetch(self.dot, move=move, **wishes)
        self._judge(outcome.error)

    def _between(self, here: int, there: int) -> None:
        self.pair.local, self.pair.remote = self.stores[here], self.stores[there]

    def _judge(self, error: Exception | None) -> None:
        """What may be refused: lines that diverged, and tips without content at the sender."""
        if error is not None and not isinstance(
            error, (ContentAbsent, Diverged, NotFastForward, RevisionNotFound)
        ):
            raise error

    def check(self) -> None:
        for number, store in enumerate(self.stores):
            found = complete_commits(store, self.dot)
            assert self.complete[number] <= found, "something complete was lost"
            self.complete[number] = found
            graph = store.catalog.graph(self.dot)
            for commit in all_commits(store, self.dot):
                assert graph.parents(commit) == self.parents[commit]
            for commit in found:
                assert store.files(self.dot, commit) == self.files[commit]
            row = store.catalog.dot(self.dot)
            assert row is not None
            report = fsck(store, [row], full=True)  # type: ignore[arg-type]
            assert report.problems == []
            for ref in store.catalog.refs(self.dot):
                assert ref.target in found


@pytest.mark.timeout(600)
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(seed=st.integers(0, 2**32))
def test_nothing_complete_is_lost_and_everything_claimed_is_there(seed: int) -> None:
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as directory:
        pair = Pair(directory)
        third = FakeStore(f"{directory}/third")
        stores = [pair.local, pair.remote, third]
        dot = DotId(rng.randbytes(16))
        for store in stores:
            if store.catalog.remote("origin") is None:
                store.add_remote()
            store.append(DotCreated(dot, "admin", "apples", "tester"))
        world = World(stores, dot, rng, pair)
        for _ in range(25):
            here, there = rng.sample(range(3), 2)
            step = rng.random()
            if step < 0.4:
                for _ in range(rng.randrange(1, 4)):
                    world.commit(here)
            elif step < 0.5:
                world.thin(here)
            elif step < 0.75:
                world.push(here, there)
            else:
                world.fetch(here, there)
            world.check()
        for store in stores:
            store.close()
