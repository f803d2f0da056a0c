"""A store that receives and one that sends harm: every way in which objects come from elsewhere."""

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

from dmsync.core.ids import DotId
from tools.faults.content_corpus import Build
from tools.faults.forked import Ran, run_dm
from tools.faults.hostile_trees import SENDER, HostileStore, TreeMaker, turn_lenient


def is_refused(ran: Ran) -> bool:
    """Did the receiver refuse, by a typed error?"""
    looked = SENDER.encode() in ran.stderr + ran.stdout
    return ran.code in REFUSALS and not ran.is_crash and not looked


REFUSALS: Final = frozenset({10, 12, 13, 16})
"""Exit codes of a receiver, or of a sender that was refused."""


class Scene:
    """Two stores in `directory`; the hostile one's dm looks at nothing."""

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.good = os.path.join(directory, "good")
        self.evil = os.path.join(directory, "evil")
        home = os.path.join(directory, "home")
        os.makedirs(home)
        base = {name: value for name, value in os.environ.items() if not name.startswith("DM_")}
        self.good_environment = {**base, "HOME": home, "DM_HOME": self.good}
        self.evil_environment = {**base, "HOME": home, "DM_HOME": self.evil}
        self._count = 0
        with HostileStore(self.evil):
            pass
        self.must(self.run("init", "own"))
        self.must(self.run("remote", "add", "evil", self.evil))
        self.must(self.run_evil("remote", "add", "good", self.good))

    def run(self, *words: str) -> Ran:
        """The honest dm; servers that it starts are hostile."""
        return run_dm(words, self.good_environment, server_hook=turn_lenient)

    def run_evil(self, *words: str) -> Ran:
        """The hostile dm; servers that it starts are honest."""
        return run_dm(words, self.evil_environment, hook=turn_lenient)

    @staticmethod
    def must(ran: Ran) -> Ran:
        """Raises AssertionError when setting up did not work."""
        assert ran.code == 0, ran.told()
        return ran

    def make(self, *commits: Build) -> str:
        """A new dot at the hostile store with these commits, one on the other; its name."""
        self._count += 1
        name = f"d{self._count}"
        with HostileStore(self.evil) as store:
            dot = store.make_dot(name)
            for build in commits:
                store.commit(dot, build)
        return name

    def add(self, name: str, *commits: Build) -> None:
        """More commits on the dot's branch."""
        with HostileStore(self.evil) as store:
            dot = self._dot(store, name)
            for build in commits:
                store.commit(dot, build)

    def _dot(self, store: HostileStore, name: str) -> DotId:
        found = store.store.catalog.dot_by_name("", name)
        assert found is not None
        return found.dot

    def has(self, name: str) -> bool:
        """Is there a dot of that name at the honest store?"""
        lines = self.run("list", "-H").stdout.splitlines()
        return name.encode() in [line.split(b"\t")[0].lstrip(b"* ") for line in lines]


def _honest(maker: TreeMaker) -> tuple[object, ...]:
    return maker.root([maker.file(b"honest", b"first")])


def by_clone(scene: Scene, *commits: Build) -> tuple[Ran, str]:
    name = scene.make(*commits)
    return scene.run("clone", "evil", name), name


def by_bundle(scene: Scene, *commits: Build) -> tuple[Ran, str]:
    name = scene.make(*commits)
    path = os.path.join(scene.directory, f"{name}.dmb")
    made = scene.run_evil("bundle", "create", path, "--dot", name)
    if made.code != 0:
        return replace(made, code=0, stderr=b"could not be sent: " + made.stderr), name
    return scene.run("bundle", "apply", path), name


def by_push(scene: Scene, *commits: Build) -> tuple[Ran, str]:
    name = scene.make(*commits)
    return scene.run_evil("push", "good", name), name


def _after_clone(scene: Scene, words: Sequence[str], *commits: Build) -> tuple[Ran, str]:
    name = scene.make(_honest)
    scene.must(scene.run("clone", "evil", name))
    scene.add(name, *commits)
    return scene.run(*words, name), name


def by_pull(scene: Scene, *commits: Build) -> tuple[Ran, str]:
    return _after_clone(scene, ("pull", "evil"), *commits)


def by_fetch(scene: Scene, *commits: Build) -> tuple[Ran, str]:
    return _after_clone(scene, ("fetch", "evil"), *commits)


WAYS: Final = {
    "clone": by_clone,
    "bundle": by_bundle,
    "push": by_push,
    "pull": by_pull,
    "fetch": by_fetch,
}
