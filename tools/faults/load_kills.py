"""Several `dm` at once on three stores, and at a random moment SIGKILL for all of them.

Two clients commit and push to the same branch of one server, merging when the other was quicker;
on the server's own store somebody commits too. Each command keeps its threads and processes. What
was acknowledged until the kill must be there: each commit in its store, bit for bit, and each
push as an ancestor of the server's branch.
"""

import hashlib
import os
import subprocess
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from dmsync.core.graph import is_ancestor
from dmsync.core.ids import ObjectId
from dmsync.engine.fsck import fsck
from dmsync.engine.safe_files import die_with_parent
from dmsync.engine.store import Store
from dmsync.errors import DmError
from tools.faults import forked, seeded
from tools.faults.contents import CommittedTrees
from tools.faults.model import SETTINGS
from tools.faults.row import Budget, Row
from tools.faults.scene_checks import leftovers
from tools.faults.scenes import DOT, environment, forked_once, settle_remote
from tools.faults.trying import Result, in_jobs, remove, workplace

CLIENTS: Final = ("near", "second")
LOCAL: Final = "own"
"""The dot that somebody works on at the server."""
_TOLD: Final = (1, 24)
"""After so many acknowledgements the kill comes, at a random moment of the next _DELAY_S."""
_DELAY_S: Final = 0.08
_ROUND_S_MAX: Final = 60.0
_ROUNDS: Final = 20
_DIVERGED_EXIT: Final = 14


def run(budget: Budget) -> list[Row]:
    """`count` rounds of work, each ended by a kill."""
    return [run_with(budget)]


def run_with(budget: Budget, fault: str = "") -> Row:
    """The same with a seeded fault in all that works."""
    repeat = f"python -m tools.faults load-kills --seed {budget.seed} --count {budget.count}"
    row = Row("load-kills", "group kills", budget.seed, repeat)
    row.counts |= {"commits acknowledged": 0, "pushes acknowledged": 0}
    forked_once()
    place = workplace(budget)
    try:
        template = os.path.join(place, "template")
        _prepare(template)
        rounds = list(range(budget.count or 0))
        for number, result in in_jobs(rounds, partial(_round, budget, place, fault), budget):
            row.tried += 1
            for name, value in result.get("counts", {}).items():
                row.counts[name] = int(row.counts[name]) + value
            problems = result.get("problems") or ([result["raised"]] if "raised" in result else [])
            if problems:
                row.lost(f"round {number}: {'; '.join(problems)[:600]}")
    finally:
        if place != budget.directory:
            remove(place)
    return row


def _variables(directory: str, store: str) -> dict[str, str]:
    dot = LOCAL if store == "far" else DOT
    return environment(directory) | {"DM_HOME": os.path.join(directory, store), "DM_DOT": dot}


def _dm(directory: str, store: str, *arguments: str) -> forked.Ran:
    return forked.run_dm(arguments, _variables(directory, store), hook=die_with_parent)


def _must(directory: str, store: str, *arguments: str) -> str:
    ran = _dm(directory, store, *arguments)
    if ran.code != 0:
        raise RuntimeError(f"{store}: dm {' '.join(arguments)}: {ran.told()}")
    return ran.stdout.decode().strip()


def _prepare(directory: str) -> None:
    os.makedirs(directory)
    settle_remote(directory)
    _must(directory, "far", "init", LOCAL)
    _must(directory, "far", "commit", "-m", "begun")
    _must(directory, "near", "init", DOT)
    _must(directory, "near", "commit", "-m", "begun")
    _must(directory, "near", "push", "far", DOT)
    _must(directory, "second", "clone", "far", DOT)
    for store in ("near", "second", "far"):
        _must(directory, store, "dot", "path")


def _round(budget: Budget, place: str, fault: str, number: int) -> Result:
    directory = os.path.join(place, f"round-{number}")
    subprocess.run(["cp", "-a", os.path.join(place, "template"), directory], check=True)
    settle_remote(directory)
    actors = [_start(directory, name, fault) for name in (*CLIENTS, "far")]
    chance = budget.random("load-kills", number)
    _wait_for_lines(directory, chance.randint(*_TOLD))
    time.sleep(chance.uniform(0, _DELAY_S))
    for pid in actors:
        forked.kill_group(pid)
    for pid in actors:
        os.waitpid(pid, 0)
    _wait_for_all_dead(directory)
    told = {name: _acknowledged(directory, name) for name in (*CLIENTS, "far")}
    problems = forked.in_fork(lambda: _verified(directory, told))
    remove(directory)
    lines = [line for lines in told.values() for line in lines]
    counts = {
        "commits acknowledged": sum(line.startswith("commit ") for line in lines),
        "pushes acknowledged": sum(line.startswith("push ") for line in lines),
    }
    return {"problems": problems, "counts": counts}


# --- work ----------------------------------------------------------------------------------------


def _start(directory: str, name: str, fault: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        os.setpgid(0, 0)
        die_with_parent()
        if fault:
            seeded.apply(fault)
        _work(directory, name)
    finally:
        os._exit(0)


def _work(directory: str, name: str) -> None:
    """Commit, and push where that is the trade, telling each acknowledgement to a file."""
    files = _must(directory, name, "dot", "path")
    with open(os.path.join(directory, f"{name}.told"), "a", buffering=1) as told:
        for count in range(_ROUNDS):
            with open(os.path.join(files, f"{name}-{count}"), "w") as file:
                file.write(_content(name, count))
            ran = _dm(directory, name, "commit", "-m", f"{name} {count}")
            if ran.code != 0:
                told.write(f"failed commit: {ran.told()}\n")
                continue
            commit = ran.stdout.decode().strip()
            told.write(f"commit {commit} {count}\n")
            if name in CLIENTS:
                _push(directory, name, told.write)


def _push(directory: str, name: str, write: Callable[[str], object]) -> None:
    for _ in range(5):
        tip = _tip(directory, name)
        ran = _dm(directory, name, "push", "far", DOT)
        if ran.code == 0:
            write(f"push {tip}\n")
            return
        if ran.code != _DIVERGED_EXIT:
            write(f"failed push: {ran.told()}\n")
            return
        ran = _dm(directory, name, "pull", "far", "--merge")
        if ran.code != 0:
            write(f"failed pull: {ran.told()}\n")
            return


def _tip(directory: str, name: str) -> str:
    return _must(directory, name, "log", "-n", "1", "--json").split('"id": "', 1)[1][:64]


def _content(name: str, count: int) -> str:
    return f"{name} {count}\n" * (count + 1)


def _acknowledged(directory: str, name: str) -> list[str]:
    try:
        with open(os.path.join(directory, f"{name}.told")) as file:
            return [line.rstrip("\n") for line in file if line.endswith("\n")]
    except FileNotFoundError:
        return []


def _wait_for_lines(directory: str, count: int) -> None:
    """By the work done, not by the clock: a busy machine does less in a second."""
    end = time.monotonic() + _ROUND_S_MAX
    while time.monotonic() < end:
        if sum(len(_acknowledged(directory, name)) for name in (*CLIENTS, "far")) >= count:
            return
        time.sleep(0.005)


def _wait_for_all_dead(directory: str) -> None:
    """Servers die with those that started them, a moment later."""
    for _ in range(500):
        if not _holds_files(directory):
            return
        time.sleep(0.01)


def _holds_files(directory: str) -> bool:
    """Does any process have a file of these stores open?"""
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            for fd in os.listdir(f"/proc/{name}/fd"):
                if os.readlink(f"/proc/{name}/fd/{fd}").startswith(directory + "/"):
                    return True
        except OSError:
            continue
    return False


# --- verdict -------------------------------------------------------------------------------------


def _verified(directory: str, told: dict[str, list[str]]) -> list[str]:
    problems = []
    for name, lines in told.items():
        problems += [f"{name}: {line}" for line in lines if not _is_fine(line)]
        commits = [line.split()[1:] for line in lines if line.startswith("commit ")]
        problems += _check_store(directory, name, commits)
    pushes = [
        line.split()[1] for name in CLIENTS for line in told[name] if line.startswith("push ")
    ]
    problems += _check_pushes(directory, pushes)
    if problems:
        return problems
    for name in CLIENTS:
        _must(directory, name, "commit", "-m", "going on")
        _dm(directory, name, "pull", "far", "--merge")
        _must(directory, name, "push", "far", DOT)
    _must(directory, "far", "commit", "-m", "going on")
    for name in told:
        with Store.open(os.path.join(directory, name), SETTINGS) as store:
            for problem in fsck(store, full=True).problems:
                problems.append(f"{name}: fsck: {problem.where}: {problem.message}")
        problems += leftovers(directory, name)
    return problems


def _is_fine(line: str) -> bool:
    """Nothing may fail here but what had its store busy for long (exit 75), or its peer killed."""
    return not line.startswith("failed") or "exit 75" in line or "exit 13" in line


def _check_store(directory: str, name: str, commits: list[list[str]]) -> list[str]:
    """Each acknowledged commit has the file that was written before it."""
    problems = []
    try:
        with Store.open(os.path.join(directory, name), SETTINGS) as store:
            row = store.catalog.dot_by_name("", LOCAL if name == "far" else DOT)
            if row is None:
                return [f"{name}: the dot is gone"]
            committed = CommittedTrees(store)
            for commit, count in commits:
                tree = committed.tree(row.dot, ObjectId(bytes.fromhex(commit)))
                found = tree.get(f"__default__/{name}-{count}", ["", 0, ""])
                if found[2] != hashlib.sha256(_content(name, int(count)).encode()).hexdigest():
                    problems.append(f"{name}: commit {commit[:12]} lacks what was committed")
    except DmError as error:
        problems.append(f"{name}: {error.code}: {error.message}")
    return problems


def _check_pushes(directory: str, pushes: list[str]) -> list[str]:
    """Each acknowledged push is part of the branch still: nobody overwrote it."""
    try:
        with Store.open(os.path.join(directory, "far"), SETTINGS) as store:
            row = store.catalog.dot_by_name("", DOT)
            assert row is not None
            tip = store.catalog.ref(row.dot, "branch/master")
            assert tip is not None
            graph = store.catalog.graph(row.dot)
            return [
                f"push of {push[:12]} was acknowledged and is lost"
                for push in pushes
                if not graph.has(ObjectId(bytes.fromhex(push)))
                or not is_ancestor(graph, ObjectId(bytes.fromhex(push)), tip.target)
            ]
    except DmError as error:
        return [f"far: {error.code}: {error.message}"]
