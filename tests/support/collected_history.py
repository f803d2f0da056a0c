"""A store that random commands work on, and what of it has to be readable whatever gc removes."""

import io
import os
import random
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

from dmsync.core.graph import ancestors_difference
from dmsync.core.ids import DotId, ObjectId
from dmsync.engine.collecting.marking import Marking
from dmsync.engine.collecting.roots import Grace
from dmsync.engine.settings import EngineSettings
from dmsync.engine.store import Store
from dmsync.engine.tags import peel
from dmsync.storage.pack_sweeping import plan_sweep, survey
from dmsync.surfaces.cli.main import main
from tests.support.sync_stores import FakeStore, Files

REFUSALS = {0, 3, 4, 10, 14, 15, 17, 18}
"""What a random command may end with: nothing to do, no such thing, would lose, conflicts."""
COMMANDS = (
    *("write", "write", "commit", "commit", "branch", "delete", "checkout", "checkout", "reset"),
    *("tag", "note", "untag", "stash", "pop", "drop", "merge", "prune", "undo", "undo", "redo"),
)
PAGE = 4096
DATABASE = 40 * PAGE


class CollectedHistory:
    """One dot in a directory of its own; `contents` is what each commit held when it came."""

    def __init__(self, directory: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home = directory / "store"
        self.tree = directory / "tree"
        self.tree.mkdir()
        self.random = random.Random(seed)
        self.contents: dict[ObjectId, Files] = {}
        self.names = 0
        monkeypatch.setenv("DM_HOME", str(self.home))
        self.dm("init", "app", "--at", str(self.tree))
        with Store.open(str(self.home), EngineSettings("t", holding="never")) as store:
            self.dot: DotId = store.catalog.dots()[0].dot
        (self.tree / "database").write_bytes(self.random.randbytes(DATABASE))
        self.dm("commit", "-m", "first")

    def dm(self, *arguments: str, allowed: set[int] | None = None) -> int:
        out, err = io.StringIO(), io.StringIO()
        with redirect_stdout(out), redirect_stderr(err):
            code = main(list(arguments))
        told = f"dm {' '.join(arguments)}: {code}\n{out.getvalue()}{err.getvalue()}"
        assert code in (allowed or {0}), told
        return code

    def is_there(self) -> bool:
        """Enough undos take back the making of the dot."""
        with Store.open(str(self.home), EngineSettings("t", holding="never")) as store:
            row = store.catalog.dot(self.dot)
            return row is not None and row.trash is None

    def step(self) -> None:
        """One random command that is no gc."""
        pick = self.random
        name = pick.choice(("master", "topic", "fix"))
        self.names += 1
        match pick.choice(COMMANDS):
            case "write":
                self.write()
            case "commit":
                self.write()
                self.dm("commit", "-m", f"c{self.names}", allowed=REFUSALS)
            case "branch":
                self.dm("branch", name, allowed=REFUSALS | {1})
            case "delete":
                self.dm("branch", "-d", name, allowed=REFUSALS | {1, 2})
            case "checkout":
                self.dm("checkout", name, allowed=REFUSALS)
            case "reset":
                self.dm("reset", "--hard", "HEAD~1", allowed=REFUSALS)
            case "tag":
                self.dm("tag", f"t{pick.randrange(4)}", allowed=REFUSALS | {1})
            case "note":
                self.dm("tag", "-m", "note", f"n{pick.randrange(4)}", allowed=REFUSALS | {1})
            case "untag":
                self.dm("tag", "-d", f"{pick.choice('tn')}{pick.randrange(4)}", allowed=REFUSALS)
            case "stash":
                self.dm("stash", allowed=REFUSALS)
            case "pop":
                self.dm("stash", "pop", allowed=REFUSALS)
            case "drop":
                self.dm("stash", "drop", "0", allowed=REFUSALS)
            case "merge":
                self.dm("merge", name, pick.choice(("--theirs", "--ours")), allowed=REFUSALS)
            case "prune":
                self.dm("prune", "--keep-last", "2", allowed=REFUSALS)
            case "undo":
                self.dm("undo", allowed=REFUSALS)
            case "redo":
                self.dm("redo", allowed=REFUSALS)
        self.note_contents()

    def write(self) -> None:
        """Change a few pages of the database, and another file now and then."""
        pick = self.random
        with (self.tree / "database").open("r+b") as file:
            for _ in range(pick.randrange(1, 4)):
                file.seek(pick.randrange(DATABASE // PAGE) * PAGE)
                file.write(pick.randbytes(PAGE // 2))
        if pick.random() < 0.5:
            name = self.tree / pick.choice("abc")
            name.write_bytes(pick.randbytes(pick.randrange(20_000)))

    def note_contents(self) -> None:
        """Remember what new commits hold, before anything can have been removed."""
        if not self.is_there():
            return
        store = FakeStore(str(self.home))
        try:
            hollow = set(store.catalog.hollow_commits(self.dot))
            for commit in store.catalog.commit_ids(self.dot):
                if commit not in self.contents and commit not in hollow:
                    self.contents[commit] = store.files(self.dot, commit)
        finally:
            store.close()

    def collect(self, grace: str) -> None:
        """Run gc and check everything that it promises."""
        before = self.files_of_tree()
        self.dm("gc", "--grace", grace)
        self.check()
        assert self.files_of_tree() == before
        if grace == "0" and self.is_there():
            assert self.garbage() == [], "dead records are left that nothing needs"

    def check(self) -> None:
        """What is named is readable as it was; the catalog is what the log says; fsck is content."""
        self.dm("fsck", "--full")
        if not self.is_there():
            return
        store = FakeStore(str(self.home))
        try:
            graph = store.catalog.graph(self.dot)
            tips = [peel(store, self.dot, ref.target) for ref in store.catalog.refs(self.dot)]
            hollow = set(store.catalog.hollow_commits(self.dot))
            for commit in ancestors_difference(graph, tips, []):
                if commit not in hollow:
                    assert store.files(self.dot, commit) == self.contents[commit]
            for row in store.catalog.working_snapshots(self.dot):
                store.files(self.dot, row.commit)
            digest = store.catalog.digest()
            store.catalog.rebuild()
            assert store.catalog.digest() == digest, "the log does not give the same catalog"
            assert store.catalog.missing_commits(self.dot) == []
        finally:
            store.close()

    def garbage(self) -> list[str]:
        """Dead records in packs that gc would write anew, were there a gain in it."""
        with Store.open(str(self.home), EngineSettings("t", holding="never")) as store:
            marking = Marking(store, self.dot, Grace(0))
            marking.mark()
            found = survey(store.objects(self.dot), marking.is_live)
            plan = plan_sweep(found, copied_bytes_max=1 << 40, untouched=set())
            kept = {base for edges in found.edges.values() for e in edges for base in e.bases}
            return [key.hex() for key in found.dead if plan.is_going(key) and key not in kept]

    def files_of_tree(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.tree)): path.read_bytes()
            for path in sorted(self.tree.rglob("*"))
            if path.is_file()
        }


def pack_bytes(home: Path) -> int:
    """Bytes of all packs of a store."""
    return sum(path.stat().st_size for path in home.glob("dots/*/packs/*"))


def drop_index(home: Path) -> None:
    for path in home.glob("dots/*/index.sqlite*"):
        os.unlink(path)
