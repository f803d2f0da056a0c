"""gc beside every command: nothing that is named, or being stored, may ever go.

Workers run real commands on dots of their own in one store and push to and pull from a second one,
while gc --grace 0 goes round in both. Each commit is tagged at once; afterwards every tag is there
and holds what was committed, and both stores are checked by every stored byte.

Two more rows stop a commit between what it found stored already and its record, and run gc right
there; their controls take the hold away, and the care for bases, and have to lose something.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Final

from tools.faults.row import Budget, Row

ROOT: Final = Path(__file__).parents[2]
DM: Final = (sys.executable, "-m", "dmsync")
WORKERS: Final = 2
COMMANDS_PER_SCENE: Final = 40
TIMEOUT_S: Final = 120
COMMANDS: Final = (
    *("commit", "commit", "commit", "again", "reset", "side", "merge", "push", "pull"),
    *("checkout", "undo", "prune", "stash"),
)
REFUSED: Final = frozenset({1, 3, 4, 10, 14, 15, 17, 18, 75})
"""What a random command may end with beside another one. Anything else is a loss."""
_WITHOUT: Final = {
    "hold": "import dmsync.storage.holds as h; h.Hold.acquire = lambda self, **_: None; "
    "h.Hold.require = lambda self: None",
    "bases": "import dmsync.storage.pack_reencoding as r; r.Reencoding.run = lambda self: set()",
}
"""What is taken from the program for a control."""


def dm_without(what: str) -> list[str]:
    """`dm` with one of its cares taken away."""
    code = f"{_WITHOUT[what]}; from dmsync.surfaces.cli.main import main; import sys; "
    return [sys.executable, "-c", code + "sys.exit(main())"]


@dataclass
class Place:
    """A store, and how `dm` is run on it."""

    directory: Path
    program: list[str] = field(default_factory=lambda: list(DM))

    @property
    def home(self) -> Path:
        return self.directory / "store"

    def environment(self) -> dict[str, str]:
        user = self.directory / "user"
        user.mkdir(parents=True, exist_ok=True)
        return {
            "PATH": os.environ.get("PATH", ""),
            "HOME": str(user),
            "LC_ALL": "C.UTF-8",
            "PYTHONPATH": str(ROOT),
            "DM_HOME": str(self.home),
            "DM_AUTHOR": "Fault <fault@example.org>",
        }

    def dm(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*self.program, *words],
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )

    def must(self, *words: str) -> str:
        done = self.dm(*words)
        if done.returncode != 0:
            raise RuntimeError(f"dm {' '.join(words)}: {done.returncode}\n{done.stderr}")
        return done.stdout.strip()

    def problems(self) -> list[str]:
        done = self.dm("fsck", "--full")
        if done.returncode == 0:
            return []
        return (done.stdout + done.stderr).strip().splitlines()


class Worker:
    """Random commands on one dot; `tags` are commits acknowledged, with what they hold."""

    def __init__(self, here: Place, far: Place, number: int, random: Random) -> None:
        self.here, self.far, self.random = here, far, random
        self.dot = f"dot{number}"
        self.tree = here.directory / f"tree{number}"
        self.tree.mkdir()
        self.files: dict[str, bytes] = {"database": random.randbytes(200_000)}
        self.tags: dict[str, dict[str, bytes]] = {}
        self.failures: list[str] = []
        self.refused = 0
        self.old: list[dict[str, bytes]] = []
        here.must("init", self.dot, "--at", str(self.tree))
        self._write()
        self.here.must("commit", "-m", "first", "--dot", self.dot)
        if far.home.exists():
            here.must("push", "far", self.dot)

    def _write(self) -> None:
        for name in os.listdir(self.tree):
            if name not in self.files:
                (self.tree / name).unlink()
        for name, content in self.files.items():
            (self.tree / name).write_bytes(content)

    def step(self) -> None:
        """One command, and what goes with it."""
        r = self.random
        match r.choice(COMMANDS):
            case "commit":
                database = bytearray(self.files["database"])
                at = r.randrange(len(database) // 4096) * 4096
                database[at : at + 4096] = r.randbytes(4096)
                self.files["database"] = bytes(database)
                self.files[r.choice("abc")] = r.randbytes(r.randrange(40_000))
                self._commit()
            case "again":  # what may be garbage by now comes back
                if self.old:
                    self.files = dict(r.choice(self.old))
                    self._commit()
            case "reset":
                self._dm("reset", "--hard", "HEAD~1")
                self._read()
            case "side":
                name = f"s{r.randrange(3)}"
                self._dm("branch", name)
                self._dm("branch", "-d", f"s{r.randrange(3)}")
            case "merge":
                self._dm("merge", f"s{r.randrange(3)}", "--theirs")
                self._read()
            case "push":
                self._dm("push", "far", self.dot, "--stash-on-divergence")
            case "pull":
                self._dm("pull", "far", self.dot)
                self._read()
            case "checkout":
                self._dm("checkout", f"s{r.randrange(3)}")
                self._dm("checkout", "master")
                self._read()
            case "undo":
                if self._dm("branch", "undone") == 0:
                    self._dm("undo", "--dot", self.dot, naming_dot=False)
            case "prune":
                self._dm("prune", "--keep-last", "3")
            case "stash":
                self._dm("stash")
                self._dm("stash", "pop")
                self._read()

    def _dm(self, *words: str, naming_dot: bool = True) -> int:
        named = ("--dot", self.dot) if naming_dot else ()
        done = self.here.dm(*words, *named)
        if done.returncode in REFUSED:
            self.refused += 1
        elif done.returncode:
            self.failures.append(f"dm {' '.join(words)}: {done.returncode}: {done.stderr[-300:]}")
        return done.returncode

    def _commit(self) -> None:
        self._write()
        if self._dm("commit", "-m", "c") == 0:
            tag = f"k{len(self.tags)}"
            if self._dm("tag", tag) == 0:
                self.tags[tag] = dict(self.files)
                self.old.append(dict(self.files))

    def _read(self) -> None:
        self.files = {
            name: (self.tree / name).read_bytes()
            for name in os.listdir(self.tree)
            if (self.tree / name).is_file()
        }
        self.files.setdefault("database", self.random.randbytes(200_000))

    def check(self, scratch: Path) -> list[str]:
        """Every tag whose content was not pruned holds what was committed."""
        problems = list(self.failures)
        for tag, files in self.tags.items():
            out = scratch / f"{self.dot}-{tag}"
            done = self.here.dm("export", f"{tag}:__default__", str(out), "--dot", self.dot)
            if done.returncode:
                problems.append(f"{self.dot} {tag}: {done.stderr[-300:]}")
                continue
            found = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
            if found != files:
                problems.append(f"{self.dot} {tag}: holds something else")
            shutil.rmtree(out)
        return problems


class Rounds(threading.Thread):
    """gc --grace 0, again and again."""

    def __init__(self, *places: Place) -> None:
        super().__init__(daemon=True)
        self.places = places
        self.is_over = threading.Event()
        self.collected = 0
        self.skipped = 0
        self.failures: list[str] = []

    def run(self) -> None:
        while not self.is_over.is_set():
            for place in self.places:
                done = place.dm("gc", "--grace", "0", "--lock-wait", "0.3")
                if done.returncode == 0:
                    self.collected += 1
                elif done.returncode in (3, 75):
                    self.skipped += 1
                else:
                    self.failures.append(f"dm gc: {done.returncode}: {done.stderr[-300:]}")


def beside_commands(budget: Budget) -> Row:
    """Random commands of several workers while gc goes round."""
    row = Row(
        "gc beside commands",
        "commands",
        budget.seed,
        f"python -m tools.faults collection --seed {budget.seed}",
    )
    wanted = budget.count or COMMANDS_PER_SCENE
    collected = skipped = refused = 0
    scene = 0
    while row.tried < wanted and not _is_late(budget):
        directory = Path(budget.directory) / f"scene{scene}"
        here, far = Place(directory / "here"), Place(directory / "far")
        for place in (here, far):
            place.directory.mkdir(parents=True)
        far.must("init", "unused")
        here.must("remote", "add", "far", str(far.home))
        workers = [
            Worker(here, far, number, budget.random("worker", scene, number))
            for number in range(WORKERS)
        ]
        rounds = Rounds(here, far)
        rounds.start()
        steps = min(COMMANDS_PER_SCENE, wanted - row.tried)
        threads = [
            threading.Thread(target=_work, args=(worker, steps // WORKERS or 1, budget))
            for worker in workers
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        rounds.is_over.set()
        rounds.join()
        row.tried += steps
        for place in (here, far):
            place.dm("gc", "--grace", "0")
        problems = [*rounds.failures, *here.problems(), *far.problems()]
        for worker in workers:
            problems += worker.check(directory)
            refused += worker.refused
        for problem in problems:
            row.lost(f"scene {scene}: {problem}")
        collected, skipped = collected + rounds.collected, skipped + rounds.skipped
        shutil.rmtree(directory, ignore_errors=True)
        scene += 1
    row.counts |= {"gcs": collected, "left out": skipped, "refused": refused}
    return row


def _work(worker: Worker, steps: int, budget: Budget) -> None:
    for _ in range(steps):
        if _is_late(budget):
            return
        worker.step()


def _is_late(budget: Budget) -> bool:
    return budget.deadline_s is not None and time.monotonic() > budget.deadline_s


def inside_commit(budget: Budget, *, without: str | None = None) -> Row:
    """gc while a commit relies on content that nothing names."""
    row = Row(
        "gc inside a commit" if without is None else f"gc inside a commit, no {without}",
        "commits",
        budget.seed,
        f"python -m tools.faults collection --seed {budget.seed}",
        is_control=without is not None,
    )
    place = Place(Path(budget.directory) / f"inside-{without}")
    place.directory.mkdir()
    if without is not None:
        place.program = dm_without(without)
    random = budget.random("inside", without)
    tree = place.directory / "tree"
    tree.mkdir()
    config = place.directory / "user" / ".config" / "dm"
    content = bytearray(random.randbytes(400_000))
    (tree / "file").write_bytes(content)
    place.must("init", "app", "--at", str(tree))
    place.must("commit", "-m", "base")
    for _ in range(3):
        # versions that are deltas of each other, and something that the branch alone has
        content[8192:12288] = random.randbytes(4096)
        (tree / "file").write_bytes(content)
        place.must("commit", "-m", "next")
    lost = random.randbytes(300_000)
    place.must("checkout", "-b", "side")
    (tree / "more").write_bytes(lost)
    place.must("commit", "-m", "lost")
    place.must("checkout", "master")
    place.must("branch", "-d", "side")
    words = [*place.program, "gc", "--grace", "0", "--lock-wait", "0.2"]
    script = place.directory / "collect"
    quoted = " ".join("'" + word.replace("'", "'\\''") + "'" for word in words)
    script.write_text(f"#!/bin/sh\n{quoted} >/dev/null 2>&1\nexit 0\n")
    script.chmod(0o700)
    config.mkdir(parents=True)
    settings = config / "config.toml"
    settings.write_text(f'[dot.app.hooks]\nquiesce = "true"\nunquiesce = "{script}"\n')
    settings.chmod(0o600)
    (tree / "more").write_bytes(lost)
    row.tried = 1
    done = place.dm("commit", "-m", "again")
    settings.unlink()
    honest = Place(place.directory)
    if done.returncode == 0 and honest.problems():
        row.lost("a commit was acknowledged whose content is gone")
    elif done.returncode not in REFUSED and done.returncode:
        row.lost(f"commit: {done.returncode}: {done.stderr[-300:]}")
    place.dm("prune", "--keep-last", "1")
    place.dm("gc", "--grace", "0")
    for problem in honest.problems():
        row.lost(problem)
    return row


def run(budget: Budget) -> list[Row]:
    """Commands beside gc, gc inside a commit, and what these find when a care is missing."""
    return [
        beside_commands(budget),
        inside_commit(budget),
        inside_commit(budget, without="hold"),
        inside_commit(budget, without="bases"),
    ]
