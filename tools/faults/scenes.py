"""The scenes in which a fault is tried: a store or two, one command, and what must hold afterwards.

How a harness uses one:

    scene.prepare(template)              # once; a directory of its own, empty
    scene.copy(template, directory)      # for each try (or prepare(directory) in place)
    run [*REAL_DM, *scene.arguments()] with scene.environment(directory), with the fault
    scene.verify(directory, scene.acknowledged(returncode, stdout))     # [] or problems

`directory` holds `near` (the store the command works on), `far` (a store it may talk to), for some
scenes `tree` (a working tree outside the store), `config.toml` (where far is) and `model.json`. A
directory that got elsewhere by other means than `copy` (an image that was mounted) needs `settle`
once before the command, and `settle_remote` before `verify` if its path changed after it.
`victim` names the store whose process the fault is meant for: with "far" the server's.

`verify` runs in a fork of the calling process; a process with threads had better run
`python -m tools.faults.scenes NAME DIRECTORY [--acknowledged]`.
"""

import argparse
import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final

from dmsync.storage.pack_consolidation import PACKS_PER_CLASS
from tools.faults import forked, scene_trees
from tools.faults.contents import Tree, live_tree
from tools.faults.model import AUTHOR, SETTINGS, Model, Side, commit_of
from tools.faults.scene_checks import Verification

DOT: Final = "app"
MASTER: Final = "branch/master"
SUBDOT: Final = "__default__"
WARNED_EXIT: Final = 3
"""Done, but for files that could not be read, which are named."""


@dataclass(frozen=True)
class Scene:
    """One command and the state it works on. `again`: when it was not acknowledged and the refs are
    old, this is run, and must do what the first run was to do."""

    name: str
    command: tuple[str, ...]
    build: Callable[["Stage"], None]
    victim: str = "near"
    needs: str = ""
    """The command of `dm` without which the scene is skipped."""
    spoil: Callable[[str], None] | None = None
    """Changes a copied directory right before the command (migration)."""

    @property
    def is_available(self) -> bool:
        from dmsync.surfaces.cli.main import COMMANDS

        return not self.needs or any(self.needs in section for section in COMMANDS.values())

    def arguments(self) -> list[str]:
        return [*self.command]

    def environment(self, directory: str) -> dict[str, str]:
        return environment(directory)

    def acknowledged(self, returncode: int | None, stdout: bytes) -> bool:
        """Was the command said to be done: by its exit code, or by its summary before a kill?"""
        return returncode in (0, WARNED_EXIT) or any(
            line.startswith(b"{") and line.endswith(b"}") and b'"type":"summary"' in _dense(line)
            for line in stdout.splitlines()
        )

    def prepare(self, directory: str) -> None:
        """Build the state in `directory`, which is made; ready for the command at once."""
        forked_once()
        os.makedirs(directory, exist_ok=True)
        settle_remote(directory)
        stage = Stage(directory)
        self.build(stage)
        stage.model.save(directory)
        self._spoil(directory)

    def copy(self, template: str, directory: str) -> None:
        """A prepared directory once more, at another place, which must not exist."""
        subprocess.run(["cp", "-a", "--reflink=auto", template, directory], check=True)
        self.settle(directory)

    def settle(self, directory: str) -> None:
        """Make a prepared directory that was copied or mounted known at its new place."""
        settle_remote(directory)
        if os.path.isdir(os.path.join(directory, "tree")):
            problems = forked.in_fork(lambda: _attach_again(directory))
            assert not problems, problems
        self._spoil(directory)

    def verify(self, directory: str, acknowledged: bool, *, is_brief: bool = False) -> list[str]:
        """What is wrong, one line each; uses the directory up. Briefly: half as long, without a
        look at whether the next push works, where the command had nothing to do with far."""
        forked_once()
        return forked.in_fork(lambda: self.verify_here(directory, acknowledged, is_brief=is_brief))

    def verify_here(
        self, directory: str, acknowledged: bool, *, is_brief: bool = False
    ) -> list[str]:
        """`verify` in this process."""
        check = Verification(directory, DOT, self.command, environment(directory))
        is_brief = is_brief and "far" not in self.command
        return check.run(acknowledged=acknowledged, is_brief=is_brief)

    def _spoil(self, directory: str) -> None:
        if self.spoil is not None:
            self.spoil(directory)


def _dense(line: bytes) -> bytes:
    return line.replace(b" ", b"")


@cache
def forked_once() -> None:
    """Import the product once in this process, for all forks."""
    forked.import_everything()


def environment(directory: str) -> dict[str, str]:
    """Nothing of the machine's but PATH and where this checkout is."""
    return {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "PYTHONPATH": forked.CHECKOUT,
        "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": directory,
        "LC_ALL": "C.UTF-8",
        "DM_HOME": os.path.join(directory, "near"),
        "DM_CONFIG": os.path.join(directory, "config.toml"),
        "DM_AUTHOR": AUTHOR,
        "DM_DOT": DOT,
        "DM_LOCK_WAIT": "3",
    }


def settle_remote(directory: str) -> None:
    """Say where `far` is now."""
    path = os.path.join(directory, "config.toml")
    with open(path, "w") as file:
        file.write(f"[remote.far]\nurl = {json.dumps(os.path.join(directory, 'far'))}\n")
    os.chmod(path, 0o600)


def _attach_again(directory: str) -> list[str]:
    """The working tree has become another directory at another path."""
    from dmsync.core.events import TreeAttached, TreeDetached
    from dmsync.engine.store import Store

    path = os.path.join(directory, "tree")
    with Store.open(os.path.join(directory, "near"), SETTINGS) as store:
        row = store.catalog.dot_by_name("", DOT)
        if row is None or (tree := store.catalog.tree(row.dot)) is None:
            return []
        found = os.stat(path)
        if (tree.path, tree.device, tree.inode) != (path.encode(), found.st_dev, found.st_ino):
            with store.transaction("accept-moved-tree") as tx:
                tx.append(TreeDetached(row.dot))
                tx.append(
                    TreeAttached(row.dot, os.fsencode(path), False, found.st_dev, found.st_ino)
                )
    return []


# --- building ------------------------------------------------------------------------------------


class Stage:
    """A directory in which a scene is built, and its model."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.model = Model(sides={"near": Side(), "far": Side()})
        self.near, self.far = self.model.sides["near"], self.model.sides["far"]
        self.dm("init", "--bare", store="far")

    def dm(self, *arguments: str, store: str = "near") -> str:
        """Run `dm`, which must work; what it prints."""
        variables = environment(self.directory)
        variables["DM_HOME"] = os.path.join(self.directory, store)
        ran = forked.run_dm(arguments, variables)
        assert ran.code == 0, f"dm {' '.join(arguments)}: {ran.told()}"
        return ran.stdout.decode().strip()

    def init(self, *, attached: bool) -> str:
        """A dot; the directory of its files, with the first state in it."""
        if attached:
            files = self._path("tree")
            os.mkdir(files)
            self.dm("init", DOT, "--at", files)
            self.model.tree, self.model.prefix = "tree", SUBDOT
        else:
            self.dm("init", DOT)
            root = self.dm("dot", "path", f"{DOT}.__root__")
            scene_trees.write(root, "cache/warm", b"a second subdot")
            os.chmod(os.path.join(root, "cache"), 0o750)
            files = os.path.join(root, SUBDOT)
            self.model.tree, self.model.prefix = os.path.relpath(root, self.directory), ""
        scene_trees.write_first(files)
        return files

    def _path(self, *names: str) -> str:
        return os.path.join(self.directory, *names)

    def record(self, name: str) -> str:
        """Remember the working tree as it is under `name`; the name."""
        self.model.trees[name] = self.live()
        return name

    def live(self) -> Tree:
        return live_tree(self._path(self.model.tree), self.model.prefix)

    def commit(self, name: str) -> str:
        """Commit, and remember the tree under `name`; the commit's id."""
        self.record(name)
        commit = self.dm("commit", "-m", name)
        self.near.commits[commit] = name
        return commit

    def pushed(self) -> None:
        """Push master; far has what near has."""
        self.dm("push", "far", DOT)
        self.far.commits = dict(self.near.commits)

    def is_at(self, commit: str, *, far: str | None = None) -> None:
        """Before the command, and after it unless said otherwise, master is there."""
        self.near.old = self.near.new = {MASTER: commit}
        if far is not None:
            self.far.old = self.far.new = {MASTER: far}

    def tree_is(self, old: str, new: str | None = None) -> None:
        self.model.tree_old, self.model.tree_new = old, new or old


def _first_init(stage: Stage) -> None:
    stage.near.old = None
    stage.near.new = {}


def _first_commit(stage: Stage) -> None:
    stage.init(attached=False)
    stage.tree_is(stage.record("first"))
    stage.near.new = {MASTER: commit_of("first")}


def _changed(stage: Stage) -> None:
    """Committed and pushed, and changed since."""
    files = stage.init(attached=False)
    first = stage.commit("first")
    stage.pushed()
    scene_trees.write_second(files)
    stage.is_at(first, far=first)
    stage.tree_is(stage.record("second"))


def _commit(stage: Stage) -> None:
    _changed(stage)
    stage.near.new = {MASTER: commit_of("second")}


def _commit_joining(stage: Stage) -> None:
    """So many small packs that the commit joins them (protocol/PACKS.md 4)."""
    files = stage.init(attached=False)
    for number in range(PACKS_PER_CLASS):  # the first one is of a larger class
        scene_trees.write(files, "changing", b"state %d" % number)
        last = stage.commit(f"state {number}")
    scene_trees.write(files, "changing", b"the state that joins")
    stage.is_at(last)
    stage.tree_is(stage.record("second"))
    stage.near.new = {MASTER: commit_of("second")}


def _commit_attached(stage: Stage) -> None:
    files = stage.init(attached=True)
    first = stage.commit("first")
    scene_trees.write_second(files)
    stage.is_at(first)
    stage.tree_is(stage.record("second"))
    stage.near.new = {MASTER: commit_of("second")}


def _push(stage: Stage) -> None:
    _changed(stage)
    second = stage.commit("second")
    stage.is_at(second)
    stage.far.new = {MASTER: second}


def _push_new(stage: Stage) -> None:
    stage.init(attached=False)
    first = stage.commit("first")
    stage.is_at(first)
    stage.tree_is("first")
    stage.far.new = {MASTER: first}


def _pull(stage: Stage) -> None:
    """Far has a commit more, from a copy of near that came to it."""
    files = stage.init(attached=True)
    first = stage.commit("first")
    stage.pushed()
    before = [stage._path("before-near"), stage._path("before-tree")]
    for path in before:
        original = path.replace("before-", "")
        subprocess.run(["cp", "-a", original, path], check=True)
    scene_trees.write_second(files)
    second = stage.commit("second")
    stage.pushed()
    for path in before:
        original = path.replace("before-", "")
        shutil.rmtree(original)
        os.rename(path, original)
    assert not forked.in_fork(lambda: _attach_again(stage.directory))
    stage.near.commits = {first: "first"}
    stage.is_at(first, far=second)
    stage.near.new = {MASTER: second}
    stage.tree_is("first", "second")


def _clone(stage: Stage) -> None:
    _push(stage)
    stage.dm("push", "far", DOT)
    tip = stage.far.new[MASTER]
    stage.far.commits = dict(stage.near.commits)
    shutil.rmtree(stage._path("near"))
    stage.dm("init", "other")  # a store that has had other things to do
    stage.near.commits, stage.near.old, stage.near.new = {}, {}, {MASTER: tip}
    stage.far.old = stage.far.new
    stage.model.tree = stage.model.tree_old = stage.model.tree_new = ""


def _two_branches(stage: Stage) -> tuple[str, str]:
    """master at `second`, the branch side at `aside`, both from `first`, which is pushed."""
    files = stage.init(attached=True)
    first = stage.commit("first")
    stage.dm("tag", "first")
    stage.pushed()
    stage.dm("checkout", "-b", "side")
    scene_trees.write_aside(files)
    aside = stage.commit("aside")
    stage.dm("checkout", "master")
    scene_trees.write_second(files)
    second = stage.commit("second")
    stage.is_at(second, far=first)
    assert stage.near.old is not None
    stage.near.old |= {"branch/side": aside, "tag/first": first}
    stage.near.new = dict(stage.near.old)
    return second, aside


def _checkout(stage: Stage) -> None:
    _two_branches(stage)
    stage.tree_is("second", "aside")


def _reset(stage: Stage) -> None:
    _two_branches(stage)
    stage.near.new[MASTER] = stage.near.new["tag/first"]
    stage.tree_is("second", "first")


def _merge(stage: Stage) -> None:
    _two_branches(stage)
    scene_trees.write_aside(stage._path(stage.model.tree))
    merged = stage.record("merged")
    _restore_times(stage, "merged", "aside")
    stage.dm("reset", "--hard", "--discard", "master")
    stage.near.new[MASTER] = commit_of(merged)
    stage.tree_is("second", merged)


def _restore_times(stage: Stage, merged: str, source: str) -> None:
    """What a merge takes over from the other side has that side's times."""
    for path, entry in stage.model.trees[merged].items():
        theirs = stage.model.trees[source].get(path)
        if theirs is not None and entry[:3] == theirs[:3]:
            mine = stage.model.trees["second"].get(path)
            if mine is None or mine[2] != entry[2]:
                stage.model.trees[merged][path] = theirs


def _undo(stage: Stage) -> None:
    _two_branches(stage)
    stage.dm("reset", "--hard", "first")
    second = stage.near.old or {}
    stage.near.new = dict(second)
    stage.near.old = {**second, MASTER: second["tag/first"]}
    stage.tree_is("first", "second")


def _garbage(stage: Stage) -> None:
    """A commit that nothing names any more, in packs with what is needed."""
    _two_branches(stage)
    stage.dm("reset", "--hard", "--discard", "first")
    assert stage.near.old is not None
    gone = stage.near.old[MASTER]
    stage.near.old[MASTER] = stage.near.old["tag/first"]
    stage.near.new = dict(stage.near.old)
    del stage.near.commits[gone]
    stage.tree_is("first")


def _lose_catalog(directory: str) -> None:
    for end in ("", "-wal", "-shm"):
        path = os.path.join(directory, "near", f"catalog.sqlite{end}")
        if os.path.exists(path):
            os.unlink(path)


def _age(directory: str) -> None:
    """A catalog of an older schema, and a stat cache of version 1 (protocol/STORE.md 6)."""
    import xxhash

    from dmsync.core.encoding import decode, encode

    with sqlite3.connect(os.path.join(directory, "near", "catalog.sqlite")) as database:
        database.execute("PRAGMA user_version = 1")
    database.close()
    for above, _, names in os.walk(os.path.join(directory, "near", "dots")):
        for name in names:
            path = os.path.join(above, name)
            if not name.endswith(".stat") or not os.path.isfile(path):
                continue
            with open(path, "rb") as file:
                data = file.read()
            if not data.startswith(b"dmstat02"):
                continue  # made old when the template was prepared
            start = 20 + int.from_bytes(data[16:20], "big")
            root, _, lengths = decode(data[20:start], trusted=True)
            segments = []
            for length in lengths:
                segments.append(data[start : start + length])
                start += length
            body = encode((root, tuple(segments)))
            with open(path, "wb") as file:
                file.write(b"dmstat01" + xxhash.xxh3_64_digest(body) + body)


JSON: Final = "--json"
_COMMITTING: Final = ("commit", "-m", "second", JSON)
_PUSHING: Final = ("push", "far", DOT, JSON)
ALL: Final = (
    Scene("init", ("init", DOT, JSON), _first_init),
    Scene("commit-first", ("commit", "-m", "first", JSON), _first_commit),
    Scene("commit", _COMMITTING, _commit),
    Scene("commit-attached", _COMMITTING, _commit_attached),
    Scene("commit-joining", _COMMITTING, _commit_joining),
    Scene("push", _PUSHING, _push),
    Scene("push-server", _PUSHING, _push, victim="far"),
    Scene("push-new-server", _PUSHING, _push_new, victim="far"),
    Scene("pull", ("pull", "far", JSON), _pull),
    Scene("pull-server", ("pull", "far", JSON), _pull, victim="far"),
    Scene("clone", ("clone", "far", DOT, JSON), _clone),
    Scene("checkout", ("checkout", "side", JSON), _checkout),
    Scene("reset", ("reset", "--hard", "first", JSON), _reset),
    Scene("merge", ("merge", "side", "-m", "merged", JSON), _merge),
    Scene("undo", ("undo", JSON), _undo),
    Scene("gc", ("gc", "--grace", "0", JSON), _garbage, needs="gc"),
    Scene("rebuild", _COMMITTING, _commit, spoil=_lose_catalog),
    Scene("migrate", _COMMITTING, _commit, spoil=_age),
)
SCENES: Final[Mapping[str, Scene]] = {scene.name: scene for scene in ALL}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.faults.scenes")
    parser.add_argument("name", choices=sorted(SCENES))
    parser.add_argument("directory")
    parser.add_argument("--acknowledged", action="store_true")
    options = parser.parse_args(arguments)
    scene = SCENES[options.name]
    problems = scene.verify(os.path.abspath(options.directory), options.acknowledged)
    print("\n".join(problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
