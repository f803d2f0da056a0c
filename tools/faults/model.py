"""What the stores of a try may hold afterwards, and whether they do.

A model is written when a template is prepared: the trees, the commits acknowledged by then, and
the refs before and after the command under test. After a fault each store must hold every commit
bit for bit, its refs must be all old or all new (all new once the command was acknowledged), and
the working tree old, new, or between the two with the switch recorded, to be finished by whatever
comes next.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from dmsync.core.ids import DotId, ObjectId
from dmsync.engine.settings import EngineSettings
from dmsync.engine.store import Store
from dmsync.errors import DmError, StoreNotFound
from tools.faults.contents import CommittedTrees, Tree, difference

MODEL_FILE: Final = "model.json"
AUTHOR: Final = "Fault <fault@example.org>"
SETTINGS: Final = EngineSettings(AUTHOR, actor="verifier", say=lambda _: None)
_TRACKED: Final = ("branch/", "tag/")
_OF_TREE: Final = "tree "


def commit_of(tree: str) -> str:
    """Instead of a commit's id: any new commit of this tree."""
    return _OF_TREE + tree


@dataclass
class Side:
    """One store. `commits`: id to the name of its tree. `old` and `new`: full names of branches
    and tags to ids, or to `commit_of` a tree. `old` is None: there need not be a store yet."""

    commits: dict[str, str] = field(default_factory=dict)
    old: dict[str, str] | None = field(default_factory=dict)
    new: dict[str, str] = field(default_factory=dict)


@dataclass
class Model:
    """`sides` by the store's directory name. `tree` is the working tree of `near`, relative to the
    directory of the try; `tree_old` and `tree_new` name what it holds."""

    trees: dict[str, Tree] = field(default_factory=dict)
    sides: dict[str, Side] = field(default_factory=dict)
    tree: str = ""
    prefix: str = ""
    """Path of the working tree in commits."""
    tree_old: str = ""
    tree_new: str = ""

    def save(self, directory: str) -> None:
        with open(os.path.join(directory, MODEL_FILE), "w") as file:
            json.dump(asdict(self), file)

    @classmethod
    def load(cls, directory: str) -> "Model":
        with open(os.path.join(directory, MODEL_FILE)) as file:
            read: dict[str, Any] = json.load(file)
        sides = {name: Side(**side) for name, side in read.pop("sides").items()}
        return cls(sides=sides, **read)


@dataclass
class Found:
    """What a store turned out to hold."""

    is_new: bool = False
    """The refs are those after the command."""
    switching: bool = False
    problems: list[str] = field(default_factory=list)


class SideCheck:
    """Compares one store with its side of the model. Opens it as any query does."""

    def __init__(self, directory: str, name: str, model: Model, dot: str) -> None:
        self._home = os.path.join(directory, name)
        self._name = name
        self._model = model
        self._side = model.sides[name]
        self._dot = dot

    def run(self, *, acknowledged: bool) -> Found:
        found = Found()
        try:
            with Store.open(self._home, SETTINGS) as store:
                self._check(store, found)
        except StoreNotFound as missing:
            if self._side.old is not None:
                found.problems.append(f"{self._name}: {missing.message}")
        except DmError as error:
            found.problems.append(f"{self._name}: {error.code}: {error.message}")
        if acknowledged and not found.is_new:
            found.problems.append(f"{self._name}: acknowledged, but the refs are old")
        return found

    def _check(self, store: Store, found: Found) -> None:
        row = store.catalog.dot_by_name("", self._dot)
        if row is None:
            found.is_new = self._side.old == self._side.new  # nothing, and nothing to come
            if self._side.old:
                found.problems.append(f"{self._name}: the dot is gone")
            return
        found.switching = bool(store.catalog.switches(row.dot))
        committed = CommittedTrees(store)
        for commit, tree in self._side.commits.items():
            self._check_commit(committed, row.dot, commit, tree, found)
        refs = {
            ref.name: ref.target.hex()
            for ref in store.catalog.refs(row.dot)
            if ref.name.startswith(_TRACKED)
        }
        old, new = self._side.old or {}, self._side.new
        if self._matches(committed, row.dot, refs, new):
            found.is_new = True
        elif not self._matches(committed, row.dot, refs, old):
            found.problems.append(f"{self._name}: refs are neither old nor new: {refs}")
        for commit in refs.values():  # complete, whatever it is
            self._check_commit(committed, row.dot, commit, None, found)

    def _matches(
        self, committed: CommittedTrees, dot: DotId, refs: dict[str, str], wanted: dict[str, str]
    ) -> bool:
        if set(refs) != set(wanted):
            return False
        for name, value in wanted.items():
            tree = value.removeprefix(_OF_TREE)
            if tree == value:
                if refs[name] != value:
                    return False
            elif refs[name] in self._side.commits:
                return False  # a commit from before
            elif difference(self._model.trees[tree], _tree(committed, dot, refs[name])):
                return False
        return True

    def _check_commit(
        self, committed: CommittedTrees, dot: DotId, commit: str, tree: str | None, found: Found
    ) -> None:
        what = f"{self._name}: commit {commit[:12]}"
        try:
            there = _tree(committed, dot, commit)
        except DmError as error:
            found.problems.append(f"{what}: {error.code}: {error.message}")
            return
        if tree is not None and (wrong := difference(self._model.trees[tree], there)):
            found.problems.append(f"{what} has changed: {wrong}")


def _tree(committed: CommittedTrees, dot: DotId, commit: str) -> Tree:
    return committed.tree(dot, ObjectId(bytes.fromhex(commit)))
