"""Whole restores, scans and commands on trees in which names change under them."""

import os
import signal
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import Any, Final

from dmsync.core.objects import ROOT_ENTRY, Entry
from dmsync.engine.capture import capture_tree
from dmsync.engine.restore import restore_tree
from dmsync.errors import DmError
from dmsync.storage.object_store import ObjectStore
from tools.faults.flipper import Flipper
from tools.faults.forked import import_everything, run_dm
from tools.faults.row import Budget, Row
from tools.faults.sentinels import CANARY, Outside

TRIES_SHARE: Final = 20
COMMANDS_SHARE: Final = 50
PATIENCE_S: Final = 30
SUBDOT: Final = b"__default__"


class _LeakError(Exception):
    """A byte of the outside was about to be stored."""


def race_restores(budget: Budget, count: int, row: Row) -> None:
    """Two states are restored in turns, known and unknown, while a directory and a file flip."""
    with _place(budget, "restores") as (tree, outside, store):
        states = []
        for number in range(2):
            _fill(tree, number)
            states.append(_captured(tree, store, store_all=True))
        with _flippers(tree, outside):
            for number in range(max(count // TRIES_SHARE, 10)):
                if _is_late(budget):
                    break
                row.tried += 1
                target = (*states, ROOT_ENTRY)[number % 3]
                with _limited(row, f"restore {number}"):
                    _restored(tree, store, target)
            _note_harm(outside, row)
        row.counts["states"] = len(states) + 1


def race_scans(budget: Budget, count: int, row: Row) -> None:
    """Captures of a tree that somebody else owns: directories become links to the outside, files
    fifos, sockets, links, longer and shorter ones."""
    with _place(budget, "scans") as (tree, outside, store), ExitStack() as stack:
        _fill(tree, 0)
        turning = os.path.join(tree, "turning")
        os.mkdir(turning)
        for name in ("a", "b", "c", "d"):
            with open(os.path.join(turning, name), "wb") as file:
                file.write(os.urandom(300_000))
        os.mkfifo(os.path.join(turning, "pipe"))
        os.symlink(os.path.join(outside.path, "data"), os.path.join(turning, "out"))
        os.mkdir(os.path.join(turning, "folder"))
        listening = stack.enter_context(socket.socket(socket.AF_UNIX))
        here = os.getcwd()
        os.chdir(turning)  # a socket's address is short
        listening.bind("sock")
        os.chdir(here)
        stack.enter_context(
            Flipper(turning, [("a", "pipe"), ("b", "out"), ("c", "folder"), ("d", "sock")])
        )
        flippers = stack.enter_context(_flippers(tree, outside))
        for number in range(max(count // TRIES_SHARE, 10)):
            if _is_late(budget):
                break
            row.tried += 1
            with _limited(row, f"scan {number}"):
                try:
                    _captured(tree, store)
                except _LeakError:
                    row.lost(f"scan {number}: bytes of the outside were about to be stored")
        _note_harm(outside, row)
        row.counts["swaps"] = sum(flipper.swaps for flipper in flippers)


def race_commands(budget: Budget, count: int, row: Row) -> None:
    """`dm commit`, `dm checkout`, `dm reset` and `dm status` on such a tree."""
    import_everything()
    place = os.path.join(budget.directory, "commands")
    tree = os.path.join(place, "tree")
    os.makedirs(tree)
    outside = Outside(os.path.join(place, "outside"))
    environment = {**os.environ, "DM_HOME": os.path.join(place, "store"), "HOME": place}
    _fill(tree, 0)
    for setting_up in (
        ["init", "app", "--at", tree],
        ["commit", "-m", "0"],
        ["checkout", "-b", "other"],
    ):
        _must(run_dm(setting_up, environment))
    _fill(tree, 1)
    _must(run_dm(["commit", "-m", "1"], environment))
    commands: Sequence[Sequence[str]] = (
        ["checkout", "--discard", "master"],
        ["commit", "-m", "while it flips"],
        ["checkout", "--discard", "other"],
        ["status"],
        ["reset", "--hard", "--discard", "HEAD"],
        ["stash", "push"],
        ["diff"],
    )
    with _flippers(tree, outside):
        for number in range(max(count // COMMANDS_SHARE, len(commands))):
            if _is_late(budget):
                break
            words = commands[number % len(commands)]
            row.tried += 1
            ran = run_dm(words, environment, patience_s=PATIENCE_S)
            if ran.code is None or ran.is_crash:
                row.lost(f"dm {words[0]}: {ran.told()}")
    _note_harm(outside, row)
    held = run_dm(["log", "--json", "--stat"], environment).stdout
    if b"victim-outside" in held:
        row.lost("a name of the outside was recorded")


# --- parts ---------------------------------------------------------------------------------------


def _fill(tree: str, number: int) -> None:
    """A directory `flip` with something of every kind, different for each number."""
    flip = os.path.join(tree, "flip")
    os.makedirs(os.path.join(flip, "below", f"only-{number}"), exist_ok=True)
    for name in ("leaf", "data", "below/deep", "victim"):
        with open(os.path.join(flip, name), "wb") as file:
            file.write(b"inside %d" % number * 1000)
    os.chmod(os.path.join(flip, "data"), 0o600 + number)
    for name in ("link", "fifo", "again"):
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(flip, name))
    os.symlink(f"leaf{number}", os.path.join(flip, "link"))
    os.mkfifo(os.path.join(flip, "fifo"), 0o600 + number)
    os.link(os.path.join(flip, "data"), os.path.join(flip, "again"))
    os.setxattr(os.path.join(flip, "victim"), "user.number", b"%d" % number)


@contextmanager
def _flippers(tree: str, outside: Outside) -> Iterator[list[Flipper]]:
    """`flip` is a link to the outside every other moment, and so is a file in it."""
    trap = os.path.join(tree, "trap")
    os.symlink(outside.path, trap)
    swallowed = os.path.join(tree, "flip", "trap")
    os.symlink(outside.file, swallowed)
    with (
        Flipper(tree, [("flip", "trap")]) as outer,
        Flipper(os.path.join(tree, "flip"), [("leaf", "trap")]) as inner,
    ):
        yield [outer, inner]


@contextmanager
def _place(budget: Budget, name: str) -> Iterator[tuple[str, Outside, ObjectStore]]:
    place = os.path.join(budget.directory, name)
    tree = os.path.join(place, "tree")
    os.makedirs(tree)
    store = ObjectStore(os.path.join(place, "dots", "5a" * 16))
    try:
        yield tree, Outside(os.path.join(place, "outside")), store
    finally:
        store.close()


class _Watching:
    """A writer that looks at every chunk before it is stored."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._writer, name)

    def prepare(self, runs: Any, *, similar: bool) -> Any:
        for run in runs:
            for chunk in run:
                if CANARY in bytes(chunk.data):
                    raise _LeakError
        return self._writer.prepare(runs, similar=similar)


def _captured(tree: str, store: ObjectStore, *, store_all: bool = False) -> Entry:
    with store.writer() as writer:
        result = capture_tree(
            tree_path=tree,
            as_subdot=SUBDOT,
            store=store,
            writer=_Watching(writer),
            base=ROOT_ENTRY,
            stat_cache=None,
            now_ns=time.time_ns(),
        )
        if store_all:
            writer.seal()
        return result.root


def _restored(tree: str, store: ObjectStore, target: Entry) -> None:
    with suppress(DmError):
        restore_tree(
            tree_path=tree,
            as_subdot=SUBDOT,
            store=store,
            target=target,
            current=None,
            stat_cache=None,
            now_ns=time.time_ns(),
            trusted=True,
        )


@contextmanager
def _limited(row: Row, what: str) -> Iterator[None]:
    """The body may fail as the product fails, but neither hang nor break."""

    def late(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(PATIENCE_S)
    try:
        yield
    except DmError:
        pass
    except TimeoutError:
        row.lost(f"{what}: took more than {PATIENCE_S} s")
    except (OSError, RecursionError, AssertionError, ValueError) as exc:
        row.lost(f"{what}: {type(exc).__name__}: {exc}")
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _note_harm(outside: Outside, row: Row) -> None:
    for line in outside.harm():
        row.lost(f"outside: {line}")


def _is_late(budget: Budget) -> bool:
    return budget.deadline_s is not None and time.monotonic() > budget.deadline_s


def _must(ran: Any) -> None:
    assert ran.code == 0, ran.told()
