"""A dot whose operations happen at times of the test's choosing, and gc beside nobody."""

import os
from pathlib import Path

import pytest

from dmsync.core.ids import Kind, ObjectId
from dmsync.engine import branches
from dmsync.engine.collecting.collection import CollectionReport, CollectionRequest, collect
from dmsync.engine.collecting.roots import NS_PER_DAY
from dmsync.engine.fsck import fsck
from dmsync.engine.settings import EngineSettings
from dmsync.engine.store import Store
from dmsync.storage.catalog import DotRow
from tests.support.working_store import Workshop

START_NS = 1_800_000_000 * 10**9
YEARS_NS = 10 * 365 * NS_PER_DAY


class Yard:
    """A dot whose operations happen at times of the test's choosing."""

    def __init__(self, directory: Path, patch: pytest.MonkeyPatch) -> None:
        self.home = directory / "home"
        self.tree = directory / "tree"
        self.now_ns = START_NS
        patch.setattr("time.time_ns", lambda: self.now_ns)
        self.shop = Workshop(self.home)
        self.dot: DotRow = self.shop.attach("shop", self.tree)

    @property
    def store(self) -> Store:
        return self.shop.store

    def commit(self, content: str = "", *, days: float = 0) -> ObjectId:
        self.now_ns += int(days * NS_PER_DAY)
        (self.tree / "file").write_text(content or str(self.now_ns))
        os.utime(self.tree / "file", ns=(self.now_ns, self.now_ns))
        made = self.shop.commit(self.dot, f"c {content}").commit
        assert made is not None
        return made

    def lost_branch(self, name: str = "side") -> ObjectId:
        """A commit that only operations name."""
        self.shop.checkout(self.dot, name, create=True)
        made = self.commit(f"on {name}")
        self.shop.checkout(self.dot, "master")
        branches.delete_branch(self.store, self.dot, name)
        return made

    def collect(self, days: float = 0, *, dry_run: bool = False) -> CollectionReport:
        """As the command: in a store of its own, beside nobody."""
        self.shop.close()
        settings = EngineSettings("gc", lock_wait_s=1, holding="never")
        try:
            with Store.open(str(self.home), settings) as store:
                request = CollectionRequest(int(days * NS_PER_DAY), dry_run)
                return collect(store, None, request)
        finally:
            self.shop.store = Store.open(str(self.home), self.shop.settings)

    def is_here(self, commit: ObjectId) -> bool:
        known = self.store.catalog.has_commit(self.dot.dot, commit)
        assert known == self.store.objects(self.dot.dot).has(Kind.COMMIT, commit)
        return known

    def check(self) -> None:
        assert fsck(self.store, full=True).problems == []
