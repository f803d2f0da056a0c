"""Loops of commands that a power cut ends, and what the stores have to hold afterwards.

A loop runs `dm` in forks, one command after the other, and tells whoever reads its pipe what is
about to be done (`begun`) and what `dm` has acknowledged. Everything it touches lies on the image
that is cut, its stdout does not. `check` then compares the stores with the last state told.
"""

import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from glob import glob
from typing import Any, Final

from dmsync.core.ids import ObjectId
from dmsync.engine.store import Store
from dmsync.errors import DmError
from tools.faults.contents import CommittedTrees, Tree, difference, live_tree
from tools.faults.forked import PATIENCE_S, Hook, Ran, in_fork, run_dm, start_dm, wait_for
from tools.faults.model import AUTHOR, SETTINGS

Json = dict[str, Any]
Refs = dict[str, str]
Say = Callable[[Json], None]

MASTER: Final = "branch/master"
SUBDOT: Final = "__default__"
NEW: Final = "?"
"""Instead of an id: a new commit of the tree that was begun."""
_GONE: Final = "the dot is gone"
_LOST: Final = (": refs ", _GONE, ": no-revision: ")
_WRONG: Final = "is not what was committed"
_PAGE_BYTES: Final = 4096
_PAGES: Final = 40
_TALKING: Final = ("push", "pull", "fetch", "clone")
"""Commands that want a server; a fork for that costs as much as the command."""


class StepFailed(Exception):
    """A command of a loop failed though nothing was cut."""


@dataclass
class State:
    """What was acknowledged. `refs` by store; `commits` to their trees; `tree`: what the working
    tree durably is, None when it was written to since."""

    refs: dict[str, Refs] = field(default_factory=dict)
    commits: dict[str, Tree] = field(default_factory=dict)
    tree: Tree | None = None
    exported: dict[str, Tree] = field(default_factory=dict)
    """Directories that were written outside of any store."""
    acks: int = 0
    begun: Json | None = None
    """The command in flight: `store`, `refs` that it would leave, `tree` of its new commit."""

    def copy(self) -> "State":
        refs = {store: dict(found) for store, found in self.refs.items()}
        return replace(self, refs=refs, commits=dict(self.commits), exported=dict(self.exported))

    def hear(self, message: Json) -> None:
        """One message of the loop."""
        if "begun" in message:
            self.begun = message["begun"]
            if self.begun is None or self.begun.get("touches_tree"):
                self.tree = None
            return
        self.acks += 1
        self.begun = None
        self.refs[message["store"]] = message["refs"]
        self.commits.update(message.get("commits", {}))
        self.exported.update(message.get("exported", {}))
        if "tree" in message:
            self.tree = message["tree"]


def environment(root: str, store: str) -> dict[str, str]:
    """Of a `dm` that works on one store below `root`."""
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "HOME": root,
        "LC_ALL": "C.UTF-8",
        "DM_HOME": os.path.join(root, store),
        "DM_AUTHOR": AUTHOR,
    }


def dm(root: str, store: str, *arguments: str, hook: Hook | None = None) -> Ran:
    if arguments[0] in _TALKING:
        return run_dm(arguments, environment(root, store), hook=hook)
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        outputs = (out.fileno(), err.fileno())
        pid = start_dm(arguments, environment(root, store), outputs, hook=hook)
        code = wait_for(pid, PATIENCE_S)
        out.seek(0)
        err.seek(0)
        return Ran(code, out.read(), err.read())


def must(ran: Ran) -> Ran:
    """Raises StepFailed."""
    if ran.code != 0:
        raise StepFailed(ran.told())
    return ran


# --- what the working tree holds -----------------------------------------------------------------


def page(number: int, version: int) -> bytes:
    return random.Random(f"{number}:{version}").randbytes(_PAGE_BYTES)


def write_version(tree: str, version: int, *, sync: bool = False) -> None:
    """Change the tree as a database would: pages in place, a log that grows, files that come and
    go. Nothing is synced by the writer, unless asked."""
    os.makedirs(os.path.join(tree, "data"), exist_ok=True)
    path = os.path.join(tree, "data/pages.db")
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    for number in range(_PAGES):
        if version == 0 or (number + version) % 9 == 0:
            os.pwrite(fd, page(number, version), number * _PAGE_BYTES)
    if sync:
        os.fdatasync(fd)
    os.close(fd)
    with open(os.path.join(tree, "data/log"), "ab") as log:
        log.write(b"version %d did something\n" % version * 20)
    with open(os.path.join(tree, f"note-{version % 5}"), "wb") as note:
        note.write(b"%d " % version * (version % 7))
    gone = os.path.join(tree, f"note-{(version + 2) % 5}")
    if version % 3 == 0 and os.path.exists(gone):
        os.unlink(gone)


# --- loops ---------------------------------------------------------------------------------------


class Loop:
    """One scene. `stores` are its directories below the root, the working tree is `tree`."""

    name = ""
    stores: tuple[str, ...] = ("near",)
    outside: tuple[str, ...] = ()
    """Those of `stores` that lie on another disk, which is not cut."""

    attached: bool = False

    def __init__(self, hook: Hook | None = None) -> None:
        self.hook = hook

    def prepare(self, root: str) -> State:
        """Make the stores that the loop begins with."""
        raise NotImplementedError

    def run(self, root: str, state: State, rng: random.Random, say: Say) -> None:
        """Run commands until killed, or until all is done."""
        raise NotImplementedError

    # --- shared steps ---

    def _make_near(self, root: str) -> State:
        if self.attached:
            os.makedirs(os.path.join(root, "tree"))
            must(dm(root, "near", "init", "app", "--at", os.path.join(root, "tree")))
        else:
            must(dm(root, "near", "init", "app"))
        write_version(tree_of(root), 0)
        state = State()
        for version in (1, 2, 3):
            self._commit(root, state, version, state.hear)
        return state

    def _commit(self, root: str, state: State, version: int, say: Say) -> None:
        tree = tree_of(root)
        say({"begun": None})
        write_version(tree, version)
        held = live_tree(tree, SUBDOT)
        refs = dict(state.refs.get("near", {}))
        say({"begun": {"store": "near", "refs": {**refs, MASTER: NEW}, "tree": held}})
        ran = must(dm(root, "near", "commit", "-m", str(version), "--json", hook=self.hook))
        commit = json.loads(ran.stdout.splitlines()[-1])["commit"]
        refs[MASTER] = commit
        say({"store": "near", "refs": refs, "commits": {commit: held}})

    def _moved(
        self, root: str, store: str, refs: Refs, say: Say, *arguments: str, **more: Any
    ) -> None:
        """A command that leaves `refs`; `tree=` what the working tree holds afterwards."""
        touches = "tree" in more
        say({"begun": {"store": store, "refs": refs, "touches_tree": touches, **more}})
        must(dm(root, "near", *arguments, hook=self.hook))
        say({"store": store, "refs": refs, **more})


def tree_of(root: str, store: str = "near") -> str:
    """The directory of the working tree of a store's dot."""
    managed = glob(os.path.join(root, store, "dots/*/trees/master", SUBDOT))
    return managed[0] if managed else os.path.join(root, "tree")


class LocalLoop(Loop):
    """Commits, tags, branches, and switches of the working tree back and forth."""

    name = "commit, tag, branch, reset"

    def prepare(self, root: str) -> State:
        return self._make_near(root)

    def run(self, root: str, state: State, rng: random.Random, say: Say) -> None:
        def tell(message: Json) -> None:
            state.hear(message)
            say(message)

        for version in range(4, 10_000):
            refs = dict(state.refs["near"])
            match rng.choice(("commit", "commit", "commit", "tag", "branch", "reset", "reset")):
                case "commit":
                    self._commit(root, state, version, tell)
                case "tag" | "branch" as kind:
                    refs[f"{kind}/v{version}"] = refs[MASTER]
                    self._moved(root, "near", refs, tell, kind, f"v{version}")
                case _:
                    commit = rng.choice(sorted(state.commits))
                    refs[MASTER] = commit
                    held = state.commits[commit]
                    self._moved(root, "near", refs, tell, "reset", "--hard", commit, tree=held)


class AttachedLoop(LocalLoop):
    """The same with a directory of the user's as working tree."""

    name = "commit, reset, attached"
    attached = True


class SyncLoop(Loop):
    """Commits, each pushed to a second store and pulled from there into a third."""

    name = "push, pull"
    stores = ("near", "far", "third")

    def prepare(self, root: str) -> State:
        state = self._make_near(root)
        must(dm(root, "far", "init", "--bare"))
        must(dm(root, "near", "remote", "add", "far", os.path.join(root, "far")))
        must(dm(root, "near", "push", "far"))
        must(dm(root, "third", "init", "--bare"))
        must(dm(root, "third", "remote", "add", "far", os.path.join(root, "far")))
        must(dm(root, "third", "clone", "far", "app"))
        state.refs["far"] = state.refs["third"] = dict(state.refs["near"])
        return state

    def run(self, root: str, state: State, rng: random.Random, say: Say) -> None:
        def tell(message: Json) -> None:
            state.hear(message)
            say(message)

        for version in range(4, 10_000):
            for _ in range(rng.choice((1, 1, 2))):
                self._commit(root, state, version, tell)
            refs = dict(state.refs["near"])
            self._moved(root, "far", refs, tell, "push", "far", "-q")
            if rng.random() < 0.5:
                tell({"begun": {"store": "third", "refs": refs}})
                must(dm(root, "third", "pull", "far", "-q", hook=self.hook))
                tell({"store": "third", "refs": refs})


class ServerCutLoop(SyncLoop):
    """The same; only the disk of the second store is cut."""

    name = "push, pull; server cut"
    outside = ("near", "third")


class ClientCutLoop(SyncLoop):
    """The same; only the disk of the clients is cut."""

    name = "push, pull; clients cut"
    outside = ("far",)


class ExportLoop(Loop):
    """Commits written into directories of their own."""

    name = "export"

    def prepare(self, root: str) -> State:
        return self._make_near(root)

    def run(self, root: str, state: State, rng: random.Random, say: Say) -> None:
        for number in range(10_000):
            commit = rng.choice(sorted(state.commits))
            path = os.path.join(root, f"exported-{number}")
            must(dm(root, "near", "export", commit, path, hook=self.hook))
            told = {"store": "near", "refs": state.refs["near"]}
            say({**told, "exported": {path: state.commits[commit]}})


class FirstLoop(Loop):
    """New stores, each with its first commit."""

    name = "init"
    stores = ()

    def prepare(self, root: str) -> State:
        tree = os.path.join(root, "tree")
        os.makedirs(tree)
        write_version(tree, 0)
        return State()

    def run(self, root: str, state: State, rng: random.Random, say: Say) -> None:
        for number in range(10_000):
            store, tree = f"new-{number}", os.path.join(root, f"tree-{number}")
            shutil.copytree(os.path.join(root, "tree"), tree)
            say({"begun": None})
            must(dm(root, store, "init", "app", "--at", tree, hook=self.hook))
            say({"store": store, "refs": {}})
            held = live_tree(tree, SUBDOT)
            refs = {MASTER: NEW}
            say({"begun": {"store": store, "refs": refs, "tree": held}})
            ran = must(dm(root, store, "commit", "-m", "first", "--json", hook=self.hook))
            commit = json.loads(ran.stdout.splitlines()[-1])["commit"]
            say({"store": store, "refs": {MASTER: commit}, "commits": {commit: held}})


LOOPS: Final[Mapping[str, type[Loop]]] = {
    loop.name: loop
    for loop in (
        LocalLoop,
        AttachedLoop,
        SyncLoop,
        ServerCutLoop,
        ClientCutLoop,
        ExportLoop,
        FirstLoop,
    )
}


# --- after the cut -------------------------------------------------------------------------------


def check(root: str, state: State, rng: random.Random) -> list[str]:
    """What is wrong with the stores after a cut: nothing, when the promises hold."""
    problems = in_fork(lambda: _check_stores(root, state))
    for path, tree in state.exported.items():
        held = live_tree(path) if os.path.isdir(path) else {}
        if wrong := difference(tree, held):
            problems.append(f"exported as {os.path.basename(path)}: {wrong}")
    for store in state.refs:
        ran = dm(root, store, "fsck", "--full", "--json")
        if ran.code != 0:
            problems.append(f"{store}: fsck: {ran.told()}")
    if not problems and "near" in state.refs:
        problems += _go_on(root, state, rng)
    return problems


def check_detected(root: str, state: State) -> tuple[list[str], str]:
    """The same after a disk has lied: what was acknowledged may be lost, but nothing may be wrong
    without fsck saying so. Returns problems, and how it turned out."""
    silent: list[str] = []
    noticed = False
    for store in state.refs:
        ran = dm(root, store, "fsck", "--full", "--json")
        if ran.is_crash:
            silent.append(f"{store}: fsck: {ran.told()}")
        noticed = noticed or ran.code != 0
    found = in_fork(lambda: _check_stores(root, state))
    lost = [line for line in found if any(what in line for what in _LOST)]
    damaged = [line for line in found if line not in lost]
    # Bytes that are not those committed may never be served without a word.
    silent += [line for line in damaged if _WRONG in line or line.startswith("failed: ")]
    if damaged and not noticed:
        silent += [line for line in damaged if line not in silent]
    how = "damage noticed" if noticed else "acknowledged work lost" if lost else "unharmed"
    return silent, how


def _check_stores(root: str, state: State) -> list[str]:
    problems = []
    for store, refs in state.refs.items():
        try:
            with Store.open(os.path.join(root, store), SETTINGS) as opened:
                problems += _check_store(opened, store, refs, state)
        except DmError as error:
            problems.append(f"{store}: {error.code}: {error.message}")
    return problems


def _check_store(opened: Store, store: str, acked: Refs, state: State) -> list[str]:
    row = opened.catalog.dot_by_name("", "app")
    if row is None:
        return [f"{store}: {_GONE}"]
    committed = CommittedTrees(opened)
    found = {
        ref.name: ref.target.hex()
        for ref in opened.catalog.refs(row.dot)
        if ref.name.startswith(("branch/", "tag/"))
    }
    problems = []
    if found != acked and not _is_begun(state, store, found):
        problems.append(f"{store}: refs {_short(found)}, acknowledged {_short(acked)}")
    for commit in {*acked.values(), *found.values(), *_all_acked(state, store)}:
        try:
            tree = committed.tree(row.dot, ObjectId(bytes.fromhex(commit)))
        except DmError as error:
            problems.append(f"{store}: commit {commit[:12]}: {error.code}: {error.message}")
            continue
        wanted = state.commits.get(commit)
        if wanted is None:
            begun = state.begun or {}
            wanted = begun.get("tree") if begun.get("store") == store else None
        if wanted is None:
            problems.append(f"{store}: commit {commit[:12]} came from nowhere")
        elif wrong := difference(wanted, tree):
            problems.append(f"{store}: commit {commit[:12]} {_WRONG}: {wrong}")
    return problems


def _all_acked(state: State, store: str) -> set[str]:
    return set(state.commits) if store == "near" else set()


def _is_begun(state: State, store: str, found: Refs) -> bool:
    """Are the refs those that the command in flight would have left?"""
    begun = state.begun
    if begun is None or begun["store"] != store or set(begun["refs"]) != set(found):
        return False
    return all(
        found[name] not in state.commits if wanted == NEW else found[name] == wanted
        for name, wanted in begun["refs"].items()
    )


def _short(refs: Refs) -> str:
    return ", ".join(f"{name}={commit[:8]}" for name, commit in sorted(refs.items())[-6:])


def _go_on(root: str, state: State, rng: random.Random) -> list[str]:
    """The next commands work without repair, and do what they say."""
    tree = tree_of(root)
    problems = []
    if state.tree is not None and (wrong := difference(state.tree, live_tree(tree, SUBDOT))):
        problems.append(f"the tree of an acknowledged switch: {wrong}")
    if rng.random() < 0.5:
        commit = rng.choice(sorted(state.commits))
        ran = dm(root, "near", "reset", "--hard", commit)
        if ran.code != 0:
            return [*problems, f"reset after the cut: {ran.told()}"]
        if wrong := difference(state.commits[commit], live_tree(tree, SUBDOT)):
            problems.append(f"reset to {commit[:12]} after the cut: {wrong}")
    else:
        write_version(tree, 20_000)
    ran = dm(root, "near", "commit", "-m", "after", "--json")
    if ran.code != 0:
        return [*problems, f"commit after the cut: {ran.told()}"]
    commit = json.loads(ran.stdout.splitlines()[-1])["commit"]
    problems += in_fork(lambda: _compare(root, commit, live_tree(tree, SUBDOT)))
    if "far" in state.refs:
        for arguments in (["fetch", "far"], ["push", "far", "--force-with-lease"]):
            ran = dm(root, "near", *arguments)
            if ran.code != 0:
                problems.append(f"{arguments[0]} after the cut: {ran.told()}")
        ran = dm(root, "far", "fsck", "--full", "--json")
        if ran.code != 0:
            problems.append(f"far: fsck after the push: {ran.told()}")
    return problems


def _compare(root: str, commit: str, held: Tree) -> list[str]:
    with Store.open(os.path.join(root, "near"), SETTINGS) as store:
        row = store.catalog.dot_by_name("", "app")
        assert row is not None
        tree = CommittedTrees(store).tree(row.dot, ObjectId(bytes.fromhex(commit)))
    wrong = difference(held, tree)
    return [f"what was committed after the cut is not what the tree held: {wrong}"] if wrong else []
