"""A live directory with a real object store: capture, status and restore in one line each."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from dmsync.core.objects import ROOT_ENTRY, Entry
from dmsync.engine.capture import CaptureResult, StatusResult, capture_tree, status_of_tree
from dmsync.engine.change_tally import tallied
from dmsync.engine.differences import tree_differences
from dmsync.engine.restore import RestoreResult, restore_tree
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.stat_cache import StatCache

SUBDOT = b"__default__"


class LiveTree:
    """`root` and `cache` are what the tree was last captured or restored as."""

    def __init__(
        self,
        path: Path,
        store: ObjectStore,
        *,
        subdot: bytes | None = SUBDOT,
        as_root: bool = False,
    ) -> None:
        path.mkdir(exist_ok=True)
        self.path = path
        self.store = store
        self.subdot = subdot
        self.as_root = as_root
        self.root: Entry = ROOT_ENTRY
        self.cache: StatCache | None = None

    def capture(self) -> CaptureResult:
        with self.store.writer() as writer:
            result = capture_tree(
                tree_path=os.fspath(self.path),
                as_subdot=self.subdot,
                store=self.store,
                writer=writer,
                base=self.root,
                stat_cache=self.cache,
                now_ns=time.time_ns(),
                root_metadata=self.as_root,
            )
            writer.seal()
        told = tree_differences(self.store, self.root, result.root)
        if result.changes is not None:
            total = result.changes.total()
            assert total == tallied(told), "a capture tells what it changed"
        self.root, self.cache = result.root, result.stat_cache
        return result

    def status(self) -> StatusResult:
        return status_of_tree(
            tree_path=os.fspath(self.path),
            as_subdot=self.subdot,
            store=self.store,
            base=self.root,
            stat_cache=self.cache,
            now_ns=time.time_ns(),
            root_metadata=self.as_root,
        )

    def changes(self) -> list[tuple[str, bytes]]:
        prefix = len(self.subdot) + 1 if self.subdot else 0
        return [(change.kind, change.path[prefix:]) for change in self.status().changes]

    def restore(self, target: Entry, *, trusted: bool = True) -> RestoreResult:
        result = restore_tree(
            tree_path=os.fspath(self.path),
            as_subdot=self.subdot,
            store=self.store,
            target=target,
            current=self.root if self.cache else None,
            stat_cache=self.cache,
            now_ns=time.time_ns(),
            trusted=trusted,
            root_metadata=self.as_root,
        )
        self.root, self.cache = target, result.stat_cache
        return result

    def age(self) -> None:
        """Let the clock of file times pass everything written so far."""
        time.sleep(0.05)


def make_object_store(home: Path) -> ObjectStore:
    return ObjectStore(os.fspath(home / "dots" / ("5a" * 16)))


def as_nobody(work: Callable[[], None]) -> None:
    """Run `work` in a child process of the user nobody; its failure is raised here."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    _, waited = os.waitpid(child, 0)
    assert waited == 0, "the child failed: see its traceback"


def set_acl(path: Path, *entries: str, default: bool = False) -> None:
    flags = ["-d"] if default else []
    subprocess.run(["setfacl", *flags, "-m", ",".join(entries), os.fspath(path)], check=True)
