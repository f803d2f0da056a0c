"""Judges a directory after a fault: what must hold then, and after the next commands."""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Final

from dmsync.core.ids import ObjectId
from dmsync.engine.fsck import fsck
from dmsync.engine.store import Store
from dmsync.errors import DmError
from tools.faults import forked, scene_trees
from tools.faults.contents import CommittedTrees, Tree, difference, live_tree
from tools.faults.model import SETTINGS, Found, Model, SideCheck

_TEMPORARY: Final = re.compile(r"\.tmp-|^tmp-|^\.dm-tmp-|\.new(-wal|-shm|-journal)?$")
_PASSING: Final = ("quarantine", "transfers", "tmp")
"""Directories in which nothing stays when all commands have ended."""
_ONE_OF: Final = ("hold.lock", "namespace")
"""Files of a quarantine of which there is never more than one."""


class Verification:
    """One directory of a scene after its command, however that ended. Uses the directory up."""

    def __init__(
        self, directory: str, dot: str, command: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self._directory = directory
        self._dot = dot
        self._command = command
        self._environment = dict(environment)
        self._model = Model.load(directory)
        self._is_brief = False
        self._problems: list[str] = []

    def run(self, *, acknowledged: bool, is_brief: bool = False) -> list[str]:
        """What is wrong. Briefly: without a look at whether the other store can be worked with."""
        self._is_brief = is_brief
        near = self._check_sides(acknowledged=acknowledged)
        self._check_tree(near, acknowledged=acknowledged)
        if not self._problems:
            self._go_on(near)
        return self._problems

    # --- as it was left --------------------------------------------------------------------------

    def _check_sides(self, *, acknowledged: bool) -> Found:
        found = {
            name: SideCheck(self._directory, name, self._model, self._dot).run(
                acknowledged=acknowledged
            )
            for name in self._model.sides
        }
        for side in found.values():
            self._problems += side.problems
        return found["near"]

    def _check_tree(self, near: Found, *, acknowledged: bool) -> None:
        if not self._model.tree:
            return
        live = self._live()
        old, new = self._named(self._model.tree_old), self._named(self._model.tree_new)
        if acknowledged and (wrong := difference(new, live)):
            self._problems.append(f"acknowledged, but the tree is not new: {wrong}")
        elif not near.switching and live not in (old, new):
            wrong = difference(new if near.is_new else old, live)
            self._problems.append(f"the tree is neither old nor new, and nobody knows: {wrong}")

    def _named(self, name: str) -> Tree:
        return self._model.trees[name]

    def _live(self) -> Tree:
        path = os.path.join(self._directory, self._model.tree)
        return live_tree(path, self._model.prefix)

    # --- what comes next -------------------------------------------------------------------------

    def _go_on(self, near: Found) -> None:
        """The command again where it was cut, then work as usual."""
        is_moved = near.is_new and self._model.sides["near"].old != self._model.sides["near"].new
        if not is_moved:
            self._dm(*self._command)
        elif near.switching:  # whatever changes something finishes it, and says so
            self._dm("commit", "-m", "finished")
        else:
            self._dm("status")
        if self._problems:
            return
        if self._model.tree:
            wrong = difference(self._named(self._model.tree_new), self._live())
            if wrong:
                self._problems.append(f"the tree is not as the command leaves it: {wrong}")
        self._work()
        for store in self._stores():
            self._check_all(store)
        if not self._problems:
            self._look_for_leftovers()

    def _stores(self) -> tuple[str, ...]:
        return ("near",) if self._is_brief else ("near", "far")

    def _check_all(self, name: str) -> None:
        """`dm fsck --full`."""
        with self._open(name) as store:
            for problem in fsck(store, full=True).problems:
                told = f"{problem.dot} {problem.where}: {problem.message}"
                self._problems.append(f"{name}: fsck: {told}")

    def _open(self, name: str) -> Store:
        return Store.open(os.path.join(self._directory, name), SETTINGS)

    def _work(self) -> None:
        """Change something, commit and push it: far must have it, bit for bit."""
        root, files, branch = self._places()
        scene_trees.write(files, "next", b"life goes on")
        commit = self._dm("commit", "-m", "next")
        if not self._is_brief:
            self._dm("push", "far", self._dot, branch)
        if self._problems:
            return
        live = live_tree(root, self._model.prefix)
        if self._model.tree:
            expected = {**self._named(self._model.tree_new)}
            expected["__default__/next"] = live["__default__/next"]
            if wrong := difference(expected, live):
                self._problems.append(f"the tree is not as the command leaves it: {wrong}")
        for store in self._stores():
            self._compare(store, commit, live)

    def _places(self) -> tuple[str, str, str]:
        """The directory of the working tree, that of its default subdot, and the branch."""
        with self._open("near") as store:
            row = store.catalog.dot_by_name("", self._dot)
            assert row is not None
            branch = store.catalog.head(row.dot)
            managed = store.layout.tree_dir(row.dot, branch)
        if self._model.prefix:
            attached = os.path.join(self._directory, self._model.tree)
            return attached, attached, branch
        if not os.path.isdir(managed):  # a clone: it is made when it is first asked for
            self._dm("dot", "path", self._dot)
        return managed, os.path.join(managed, "__default__"), branch

    def _compare(self, name: str, commit: str, live: Tree) -> None:
        try:
            with self._open(name) as store:
                row = store.catalog.dot_by_name("", self._dot)
                assert row is not None
                there = CommittedTrees(store).tree(row.dot, ObjectId(bytes.fromhex(commit)))
        except DmError as error:
            self._problems.append(f"{name}: the next commit: {error.code}: {error.message}")
            return
        if wrong := difference(live, there):
            self._problems.append(f"{name}: the next commit is not what was there: {wrong}")

    def _dm(self, *arguments: str, store: str = "near") -> str:
        if self._problems:
            return ""
        variables = {**self._environment, "DM_HOME": os.path.join(self._directory, store)}
        ran = forked.run_dm(arguments, variables)
        if ran.code != 0:
            self._problems.append(f"{store}: dm {' '.join(arguments)}: {ran.told()}")
        return ran.stdout.decode("utf-8", "surrogateescape").rstrip("\n")

    def _look_for_leftovers(self) -> None:
        for store in ("near", "far"):
            self._problems += leftovers(self._directory, store)
        if self._model.tree:
            for path in self._live():
                if _TEMPORARY.search(os.path.basename(path)):
                    self._problems.append(f"left over in the tree: {path}")


def leftovers(directory: str, store: str) -> list[str]:
    """What no command is using and none has removed; nothing else is at work on the store."""
    found = []
    home = os.path.join(directory, store)
    for above, directories, names in os.walk(home):
        place = os.path.relpath(above, home)
        if "trees" in directories:
            directories.remove("trees")
        passing = set(place.split(os.sep)) & set(_PASSING)
        for name in [*directories, *names]:
            if name not in (*_PASSING, *_ONE_OF) and (passing or _TEMPORARY.search(name)):
                found.append(f"left over: {store}/{place}/{name}")
    return found
