"""What runs while the power is cut: a loop of commands, or the one command of a scene.

A subject is prepared once on a filesystem, of which an image is kept. For each try it runs in a
fork of the worker, which reads what it says; what was said before the cut has to hold after it.
"""

import json
import os
import random
import signal
from collections.abc import Callable
from functools import partial
from typing import Any, Final, Protocol

from tools.faults import cut_loops, scenes
from tools.faults.cut_loops import LOOPS, Json, Loop, Say, State, StepFailed
from tools.faults.forked import Hook, run_dm
from tools.faults.scenes import SCENES, Scene

SCENE_PREFIX: Final = "once: "
FAILED: Final = "failed"


class Subject(Protocol):
    """`told` is what was said so far, as `fresh` gives it and `hear` goes on with it."""

    name: str
    acks_max: int
    """The cut comes after one of so many acknowledgements, or before the first."""
    outside: tuple[str, ...]
    """Directories that lie on another disk, which is not cut."""

    def prepare(self, root: str) -> None: ...

    def fresh(self) -> Any: ...

    def settle(self, root: str) -> None: ...

    def run(self, root: str, told: Any, rng: random.Random, say: Say) -> None: ...

    def hear(self, told: Any, message: Json) -> bool: ...

    def check(self, root: str, told: Any, rng: random.Random) -> list[str]: ...

    def check_detected(self, root: str, told: Any) -> tuple[list[str], str]: ...


class LoopSubject:
    """Many commands, each acknowledged."""

    acks_max = 12

    def __init__(self, loop: Loop) -> None:
        self.name = loop.name
        self.outside = loop.outside
        self._loop = loop
        self._state = State()

    def prepare(self, root: str) -> None:
        self._state = self._loop.prepare(root)

    def fresh(self) -> State:
        return self._state.copy()

    def settle(self, root: str) -> None:
        """Paths and device numbers are those it was prepared with."""

    def run(self, root: str, told: State, rng: random.Random, say: Say) -> None:
        self._loop.run(root, told, rng, say)

    def hear(self, told: State, message: Json) -> bool:
        """Was it an acknowledgement?"""
        before = told.acks
        told.hear(message)
        return told.acks > before

    def check(self, root: str, told: State, rng: random.Random) -> list[str]:
        return cut_loops.check(root, told, rng)

    def check_detected(self, root: str, told: State) -> tuple[list[str], str]:
        return cut_loops.check_detected(root, told)


class SceneSubject:
    """One command of tools/faults/scenes.py."""

    acks_max = 1
    outside: tuple[str, ...] = ()

    def __init__(self, scene: Scene, hook: Hook | None = None) -> None:
        self.name = SCENE_PREFIX + scene.name
        self._scene = scene
        self._hook = hook

    def prepare(self, root: str) -> None:
        self._scene.prepare(root)

    def fresh(self) -> list[Json]:
        return []

    def settle(self, root: str) -> None:
        if self._scene.spoil is not None:
            self._scene.spoil(root)

    def run(self, root: str, told: list[Json], rng: random.Random, say: Say) -> None:
        ran = run_dm(self._scene.arguments(), self._scene.environment(root), hook=self._hook)
        if not self._scene.acknowledged(ran.code, ran.stdout):
            raise StepFailed(ran.told())
        say({"acknowledged": True})

    def hear(self, told: list[Json], message: Json) -> bool:
        told.append(message)
        return True

    def check(self, root: str, told: list[Json], rng: random.Random) -> list[str]:
        return self._scene.verify(root, bool(told))

    def check_detected(self, root: str, told: list[Json]) -> tuple[list[str], str]:
        raise NotImplementedError("only loops know what each commit held")


def subject_named(name: str, hook: Hook | None = None) -> Subject:
    if name.startswith(SCENE_PREFIX):
        return SceneSubject(SCENES[name.removeprefix(SCENE_PREFIX)], hook)
    return LoopSubject(LOOPS[name](hook))


def scene_names() -> list[str]:
    """Scenes whose whole state lies in one directory that is cut."""
    return [
        SCENE_PREFIX + scene.name
        for scene in SCENES.values()
        if scene.victim == "near" and scene.is_available
    ]


class Running:
    """A subject at work in a fork, and what it has said."""

    def __init__(
        self,
        subject: Subject,
        root: str,
        told: Any,
        rng: random.Random,
        *,
        acks_max: int | None = None,
        into: int | None = None,
    ) -> None:
        """With `acks_max` it stands still after so many acknowledgements. What it says goes `into`
        a descriptor, where nothing is heard here, and it ends instead of standing still."""
        scenes.forked_once()
        self.told = told
        self._subject = subject
        self._unfinished = b""
        self.fd, theirs = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self.fd)
            run = partial(subject.run, root, subject.fresh(), rng)
            _speak(run, theirs if into is None else into, acks_max, is_last=into is not None)
        os.close(theirs)
        os.set_blocking(self.fd, False)
        self.is_over = False
        self.failure = ""

    def hear(self) -> int:
        """Take in what was said meanwhile; the number of acknowledgements in it."""
        acks = 0
        while not self.is_over:
            try:
                data = os.read(self.fd, 1 << 20)
            except BlockingIOError:
                break
            if not data:
                self.is_over = True
                break
            *lines, self._unfinished = (self._unfinished + data).split(b"\n")
            for line in lines:
                message = json.loads(line)
                if FAILED in message:
                    self.failure = message[FAILED]
                else:
                    acks += self._subject.hear(self.told, message)
        return acks

    def close(self) -> None:
        os.close(self.fd)


def _speak(run: Callable[[Say], None], fd: int, acks_max: int | None, *, is_last: bool) -> None:
    acks = 0
    try:

        def say(message: Json) -> None:
            nonlocal acks
            line = json.dumps(message).encode() + b"\n"
            while line:
                line = line[os.write(fd, line) :]
            acks += "begun" not in message
            while acks == acks_max:
                if is_last:
                    os._exit(0)
                signal.pause()

        try:
            run(say)
        except Exception as failure:
            say({FAILED: f"{type(failure).__name__}: {failure}"})
    finally:
        os._exit(0)
