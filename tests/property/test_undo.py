"""Any sequence of commands and as many undos end where they began; as many redos, where they were.

After every single undo the store is compared with what it was before the command: refs, heads,
names, the current dot, remotes, merges under way, and the working trees byte for byte with their
metadata. A tree that the command left alone stays as it is: files written between commands are not
taken back with a commit. After every redo everything is as it was before the undo, trees included.
Times of directories alone are no uncommitted change: where nothing else differs from the branch's
tip they may come back as the tip's.

Left out: tracking refs (what was seen at a remote was seen), and `stash/undo-*`, `stash/redo-*`,
which keep what a tree held beyond the command that is taken back.

DM_TEST_LONG=1 runs 2,000 sequences.
"""

import os
import random
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from dmsync.core.ids import DotId
from dmsync.core.objects import Entry
from dmsync.engine import branches, carrying, commits, dots, remotes, stashes, tagging, trees
from dmsync.engine.differences import tree_differences
from dmsync.engine.merging import lifecycle as merging
from dmsync.engine.merging import resolution
from dmsync.engine.operations import is_undoable
from dmsync.engine.path_restore import PathRestoreRequest, restore_paths
from dmsync.engine.settings import EngineSettings
from dmsync.engine.store import Store
from dmsync.engine.transplant import TransplantRequest, cherry_pick, revert
from dmsync.engine.undoing import lifecycle
from dmsync.engine.undoing.going_back import go_back
from dmsync.engine.undoing.lifecycle import UndoRequest
from dmsync.errors import DmError
from dmsync.storage.catalog import DotRow
from tests.support.tree import Facts, describe_tree

SEQUENCES = 2000 if os.environ.get("DM_TEST_LONG") else 60
STEPS = 14
BRANCHES = ("master", "topic", "fix", "next")
FILES = ("a", "b", "d/c", "d/e", "f.txt")
OWN_STASHES = ("stash/undo-", "stash/redo-")


@dataclass
class Tree:
    """What a tree is: the root that a commit of it would have; its files, where it is written.

    `tip` is the root of the branch's tip when only times of directories differ from it: to dm that
    is no uncommitted change, so merge and its like, which want a clean tree, store nothing of it.
    The tree may come back as the tip's then, and those times are not compared.
    """

    root: Entry
    files: dict[bytes, Facts] | None
    tip: Entry | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Tree):
            return False
        if self.is_exactly(other):
            return True
        if (self.tip or self.root) != (other.tip or other.root) or self.tip is other.tip is None:
            return False
        written = self.files is not None and other.files is not None
        return not written or _timeless(self.files) == _timeless(other.files)

    def is_exactly(self, other: "Tree") -> bool:
        written = self.files is not None and other.files is not None
        return self.root == other.root and (not written or self.files == other.files)


def _timeless(files: dict[bytes, Facts] | None) -> dict[bytes, Facts]:
    """Without the times of directories."""
    return {
        path: {k: v for k, v in facts.items() if k != "mtime_ns" or not _is_directory(facts)}
        for path, facts in (files or {}).items()
    }


def _is_directory(facts: Facts) -> bool:
    return stat.S_ISDIR(int(str(facts["mode"]), 8))


@dataclass
class Observed:
    """Everything a user can see of a store, `facts` apart from the trees by (dot, branch); an
    attached directory is under the branch "". `edits`: how often files had been edited."""

    facts: dict[str, object]
    trees: dict[tuple[DotId, str], Tree]
    heads: dict[DotId, str]
    edits: int


@dataclass
class World:
    """A store with a managed and an attached dot."""

    base: Path
    random: random.Random
    store: Store
    told: list[str] = field(default_factory=list)
    edits: list[DotId] = field(default_factory=list)
    made: int = 0
    began: int = 1
    """Sequence number of the newest event before the first command."""

    def dots(self) -> list[DotRow]:
        return self.store.catalog.dots()

    def dot(self) -> DotRow:
        return self.random.choice(self.dots())

    def branch(self, dot: DotRow) -> str:
        """Mostly one that is there."""
        there = [row.short_name for row in self.store.catalog.branches(dot.dot)]
        return self.random.choice(there if there and self.random.random() < 0.75 else BRANCHES)

    # --- files ---------------------------------------------------------------------------------

    def place(self, dot: DotRow, branch: str | None = None) -> Path | None:
        branch = branch or self.store.catalog.head(dot.dot)
        place = trees.place_of(self.store, dot.dot, branch)
        if place is None:
            return None
        path = Path(os.fsdecode(place.path))
        return path / "__default__" if place.subdot is None else path

    def edit(self, dot: DotRow) -> None:
        """Write, remove, chmod a few files of a tree, mostly of the current branch's."""
        other = self.branch(dot) if self.random.random() < 0.2 else None
        place = self.place(dot, other)
        if place is None or not place.is_dir():
            return
        self.edits.append(dot.dot)
        for _ in range(self.random.choice((1, 1, 2, 3))):
            path = place / self.random.choice(FILES)
            what = self.random.random()
            if what < 0.7 or not path.exists():
                path.parent.mkdir(exist_ok=True)
                lines = [f"{self.random.randrange(4)}\n" for _ in range(self.random.randrange(5))]
                path.write_text("".join(lines))
                stamp = self.random.randrange(10**18, 2 * 10**18)
                os.utime(path, ns=(stamp, stamp))
            elif what < 0.85:
                path.unlink()
            else:
                path.chmod(self.random.choice((0o600, 0o644, 0o755)))

    # --- commands --------------------------------------------------------------------------------

    def commands(self) -> dict[str, tuple[float, Callable[[DotRow], object]]]:
        store, r = self.store, self.random
        wishes = stashes.TreeWishes()
        sides = ("ours", "theirs", "base", "as-is")

        def commit(dot: DotRow, **extra: object) -> object:
            self.made += 1
            request = commits.CommitRequest(f"commit {self.made}", **extra)  # type: ignore[arg-type]
            return commits.commit(store, dot, request)

        def merge(dot: DotRow) -> object:
            options = merging.MergeOptions(
                self.branch(dot), fast_forward=r.choice(("auto", "never")), squash=r.random() < 0.1
            )
            if options.squash:
                options = merging.MergeOptions(options.revision, squash=True)
            return merging.merge_revision(store, dot, options)

        def rename_remote(dot: DotRow) -> None:
            remotes.rename_remote(store, r.choice("pq"), r.choice("pqs"))

        def tag(dot: DotRow) -> object:
            message = r.choice((None, "an annotated tag"))
            return tagging.create_tag(
                store,
                dot,
                tagging.TagRequest(
                    r.choice(("v1", "v2")),
                    self.revision(dot),
                    message=message,
                    force=r.random() < 0.5,
                ),
            )

        def carry(dot: DotRow) -> object:
            request = carrying.CarryRequest(self.branch(dot), create=r.random() < 0.5)
            return carrying.checkout_carrying(store, dot, request)

        def restore_path(dot: DotRow) -> object:
            path = f"__default__/{r.choice(FILES)}".encode()
            return restore_paths(
                store, dot, PathRestoreRequest(self.revision(dot), (path,), delete=r.random() < 0.5)
            )

        def init(dot: DotRow) -> object:
            self.made += 1
            at = None
            if r.random() < 0.5:
                (self.base / f"extra{self.made}").mkdir()
                at = str(self.base / f"extra{self.made}")
            return dots.init_dot(store, r.choice(("new", "other")), at=at, as_root=False)

        def transplant(dot: DotRow) -> object:
            how = r.choice((cherry_pick, revert))
            request = TransplantRequest((self.revision(dot),), no_commit=r.random() < 0.3)
            return how(store, dot, request)

        def op_restore(dot: DotRow) -> object:
            return go_back(store, r.randrange(self.began, store.catalog.last_seq() + 1))

        def pop(dot: DotRow) -> object:
            return stashes.apply_stash(store, dot, None, wishes, drop=r.random() < 0.7)

        return {
            "commit": (6, commit),
            "amend": (2, lambda dot: commit(dot, amend=True)),
            "branch": (3, lambda dot: branches.create_branch(store, dot, r.choice(BRANCHES), None)),
            "checkout": (5, lambda dot: branches.checkout(store, dot, self.branch(dot))),
            "checkout -b": (
                3,
                lambda dot: branches.checkout(
                    store, dot, r.choice(BRANCHES), create=True, revision=r.choice((None, "HEAD~1"))
                ),
            ),
            "carry": (2, carry),
            "reset --hard": (
                3,
                lambda dot: branches.reset(store, dot, self.revision(dot), hard=True),
            ),
            "reset": (2, lambda dot: branches.reset(store, dot, self.revision(dot))),
            "branch -d": (3, lambda dot: branches.delete_branch(store, dot, self.branch(dot))),
            "branch -m": (
                2,
                lambda dot: branches.rename_branch(
                    store, dot, self.branch(dot), r.choice(BRANCHES)
                ),
            ),
            "merge": (6, merge),
            "resolve": (
                4,
                lambda dot: resolution.resolve_conflicts(store, dot, None, r.choice(sides)),  # type: ignore[arg-type]
            ),
            "continue": (3, lambda dot: merging.continue_merge(store, dot)),
            "abort": (2, lambda dot: merging.abort_merge(store, dot)),
            "stash push": (3, lambda dot: stashes.push_stash(store, dot, "", wishes)),
            "stash pop": (3, pop),
            "stash drop": (1, lambda dot: stashes.drop_stash(store, dot, "0")),
            "restore": (2, restore_path),
            "tag": (2, tag),
            "tag -d": (1, lambda dot: tagging.delete_tags(store, dot, [r.choice(("v1", "v2"))])),
            "remote add": (
                1,
                lambda dot: remotes.add_remote(store, r.choice("pq"), "ssh://h", None),
            ),
            "remote rm": (1, lambda dot: remotes.remove_remote(store, r.choice("pqs"))),
            "remote rename": (1, rename_remote),
            "set-upstream": (
                1,
                lambda dot: dots.set_upstream(store, dot.name, r.choice("pqs"), "far/away"),
            ),
            "dot rename": (
                1,
                lambda dot: dots.rename_dot(store, dot.name, r.choice(("renamed", "other"))),
            ),
            "dot delete": (1.5, lambda dot: dots.delete_dot(store, dot.name)),
            "init": (1.5, init),
            "cherry-pick or revert": (4, transplant),
            "op restore": (1, op_restore),
            "switch": (1, lambda dot: dots.switch_dot(store, dot.name)),
        }

    def revision(self, dot: DotRow) -> str:
        return self.random.choice(("HEAD", "HEAD~1", "HEAD@{1}", self.branch(dot)))

    def step(self) -> bool:
        """One random command; False when it was refused or changed nothing."""
        live = self.dots()
        if not live:
            dots.init_dot(self.store, "again", at=None, as_root=False)
            self.told.append("init again")
            return True
        dot = self.dot()
        commands = self.commands()
        name = self.random.choices(list(commands), [weight for weight, _ in commands.values()])[0]
        before = self.store.catalog.last_seq()
        refused = ""
        try:
            commands[name][1](dot)
        except DmError as exc:
            refused = f": {exc.code}"
        found = [row for row in self.store.catalog.operations(8) if row.first_seq > before]
        undoable = [row for row in found if is_undoable(self.store.catalog.events_of(row))]
        self.told.append(f"{name} {dot.name}{refused}")
        assert len(undoable) <= 1, f"one command, one operation: {undoable}"
        return bool(undoable)

    # --- looking -----------------------------------------------------------------------------------

    def observe(self) -> Observed:
        catalog = self.store.catalog
        facts: dict[str, object] = {
            "current dot": catalog.current_dot(),
            "remotes": catalog.remotes(),
        }
        seen: dict[tuple[DotId, str], Tree] = {}
        heads = {}
        for row in self.dots():
            heads[row.dot] = row.head
            facts[_title(row.dot)] = {
                "names": (row.namespace, row.name),
                "head": row.head,
                "refs": {
                    ref.name: (ref.target.hex(), ref.origin)
                    for ref in catalog.refs(row.dot)
                    if not ref.name.startswith(("remote/", *OWN_STASHES))
                },
                "upstreams": catalog.upstreams(row.dot),
                "working": {w.branch: w.commit.hex() for w in catalog.working_snapshots(row.dot)},
                "merges": catalog.merges(row.dot),
                "conflicts": {m.branch: catalog.conflicts(row.dot, m.branch)
                              for m in catalog.merges(row.dot)},
                "directory": (tree := catalog.tree(row.dot)) and (tree.path, tree.branch),
                "switches": catalog.switches(row.dot),
            }  # fmt: skip
            seen |= self._trees(row)
        return Observed(facts, seen, heads, len(self.edits))

    def _trees(self, row: DotRow) -> dict[tuple[DotId, str], Tree]:
        attached = self.store.catalog.tree(row.dot)
        if attached is not None:
            directory = trees.require_place(self.store, row.dot, attached.branch)
            return {(row.dot, ""): self._tree(row, directory)}
        found = {}
        names = {ref.short_name for ref in self.store.catalog.branches(row.dot)} | {row.head}
        for branch in names:
            place = trees.place_of(self.store, row.dot, branch)
            if place is None:
                tip = trees.branch_tip(self.store, row.dot, branch)
                found[row.dot, branch] = Tree(self.store.root(row.dot, tip), None)
            else:
                found[row.dot, branch] = self._tree(row, place)
        return found

    def _tree(self, row: DotRow, place: trees.TreePlace) -> Tree:
        writer = trees._DryWriter(self.store.objects(row.dot))
        result = trees.capture(self.store, row.dot, place, writer, None)
        files = describe_tree(Path(os.fsdecode(place.path)))
        tip = self.store.root(row.dot, trees.branch_tip(self.store, row.dot, place.branch))
        is_clean = result.root != tip and not tree_differences(writer, tip, result.root)
        return Tree(result.root, files, tip if is_clean else None)


def expected_after_undo(
    before: Observed,
    after: Observed,
    now: Observed,
    found: Observed,
    edits: list[DotId],
    command: str,
) -> Observed:
    """`before` the command, with the trees that it left alone as they are now; those of a dot that
    it deleted, and that somebody edited while it was back, as `found`.

    A renamed branch keeps its tree; `op restore` to before the renaming switches trees instead.
    """
    wanted = {}
    for key, tree in before.trees.items():
        dot, branch = key
        renamed = {}
        if command == "branch":
            renamed = _renamed_branch(before.facts[_title(dot)], after.facts.get(_title(dot)))
        new_key = (dot, renamed.get(branch, branch))
        head = before.heads[dot]
        is_switched = branch == "" and renamed.get(head, head) != after.heads.get(dot)
        left = after.trees.get(new_key)
        left_alone = not is_switched and left == tree
        if left is not None and not left.is_exactly(tree) and found.trees.get(key) == tree:
            left_alone = False  # times of directories were changed, and came back
        wanted[key] = now.trees[new_key] if left_alone and new_key in now.trees else tree
        if before.heads.keys() - after.heads.keys() == {dot} and dot in edits[after.edits :]:
            wanted[key] = found.trees[key]
    return Observed(before.facts, wanted, before.heads, before.edits)


def _title(dot: DotId) -> str:
    return f"dot {dot.hex()[:8]}"


def _renamed_branch(before: object, after: object) -> dict[str, str]:
    """{old: new} when the command renamed a branch of the dot: one ref went and one came."""
    if isinstance(before, dict) and isinstance(after, dict):
        gone = before["refs"].keys() - after["refs"].keys()
        came = after["refs"].keys() - before["refs"].keys()
        names = [name.removeprefix("branch/") for name in (*gone, *came)]
        if len(gone) == len(came) == 1 and not any("/" in name for name in names):
            return {names[0]: names[1]}
    return {}


def assert_same(found: Observed, wanted: Observed, told: list[str]) -> None:
    story = "\n".join(told)
    for name in sorted(wanted.facts.keys() | found.facts.keys()):
        assert found.facts.get(name) == wanted.facts.get(name), f"{name} after:\n{story}"
    assert found.trees.keys() == wanted.trees.keys(), story
    for key, tree in wanted.trees.items():
        there = found.trees[key]
        assert there == tree, f"tree of {key[1]!r} after:\n{story}"


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    directory = Path(tempfile.mkdtemp(prefix="dm-undo-", dir=memory))
    yield directory
    shutil.rmtree(directory)


def make_world(base: Path, seed: int) -> World:
    home = base / str(seed)
    home.mkdir()
    settings = EngineSettings(author="Ada <ada@example.org>", actor="ada", lock_wait_s=2)
    store = Store.open(str(home / "store"), settings, create=True)
    world = World(home, random.Random(seed), store, [f"seed {seed}"])
    (home / "web").mkdir()
    dots.init_dot(store, "app", at=None, as_root=False)
    dots.init_dot(store, "web", at=str(home / "web"), as_root=False)
    for dot in store.catalog.dots():
        world.edit(dot)
        commits.commit(store, dot, commits.CommitRequest("first"))
        world.edit(dot)
        commits.commit(store, dot, commits.CommitRequest("second", accept_moved_tree=True))
        if world.random.random() < 0.5:
            branches.create_branch(store, dot, "topic", "HEAD~1")
    world.began = store.catalog.last_seq()
    return world


@pytest.mark.parametrize("seed", range(SEQUENCES))
def test_commands_and_as_many_undos_end_where_they_began(base: Path, seed: int) -> None:
    world = make_world(base, seed)
    try:
        run(world)
    except Exception as exc:
        exc.add_note("\n".join(world.told))
        raise
    finally:
        world.store.close()
        shutil.rmtree(world.base)


def run(world: World) -> None:
    done: list[tuple[Observed, Observed]] = []
    for _ in range(STEPS):
        if world.random.random() < 0.5 and world.dots():
            dot = world.dot()
            world.edit(dot)
            world.told.append(f"edit {dot.name}")
        before = world.observe()
        if world.step():
            done.append((before, world.observe()))
    undone: list[Observed] = []
    for before, after in reversed(done):
        now = world.observe()
        undone.append(now)
        (taken,) = lifecycle.undo(world.store, 1, UndoRequest())
        world.told.append(f"undo of {taken.command} {taken.operation}")
        found = world.observe()
        wanted = expected_after_undo(before, after, now, found, world.edits, taken.command)
        assert_same(found, wanted, world.told)
    for wanted in reversed(undone):
        (taken,) = lifecycle.redo(world.store, 1, UndoRequest())
        world.told.append(f"redo of {taken.command} {taken.operation}")
        assert_same(world.observe(), wanted, world.told)
