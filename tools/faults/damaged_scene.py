"""The store that is damaged on purpose: what it holds, what it answers, what needs what."""

import json
import os
import random
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from dmsync.core.ids import ObjectId, short_key
from dmsync.core.objects import Entry, EntryKind, commit_from_bytes
from dmsync.core.pages import DIRECTORY, MANIFEST, ZERO_RUN, Page, file_spans, read_page
from dmsync.engine.history import log_commits
from dmsync.engine.settings import EngineSettings
from dmsync.engine.store import Store
from dmsync.errors import DmError
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.packs import HEADER_BYTES, iterate_file_records, read_footer
from tools.faults.forked import Ran, in_fork, run_dm

BIG_BYTES: Final = 400_000
VERSIONS: Final = 3
Survey = dict[str, str]
"""What a store answers: a question to an answer, or to `!` and the type of an error."""


@dataclass
class Scene:
    """`near` is the store to damage, `far` a whole copy of it, the remote `far`."""

    directory: str
    truth: Survey = field(default_factory=dict)
    needs: dict[str, frozenset[bytes]] = field(default_factory=dict)
    """Short keys of the objects that each answer of the survey needs."""
    bases: dict[bytes, set[bytes]] = field(default_factory=dict)
    """Short keys that a record's content is made of, directly, by its own."""
    records: dict[str, list[tuple[int, int, bytes]]] = field(default_factory=dict)
    """Of each pack, by path below the store: begin, end and key of each record."""

    @property
    def near(self) -> str:
        return os.path.join(self.directory, "near")

    @property
    def far(self) -> str:
        return os.path.join(self.directory, "far")

    @property
    def older(self) -> str:
        """A copy of `near` as it was some operations before."""
        return os.path.join(self.directory, "older")

    def environment(self, home: str) -> dict[str, str]:
        return {
            "PATH": os.environ["PATH"],
            "HOME": self.directory,
            "DM_HOME": home,
            "DM_AUTHOR": "Ada <ada@example.org>",
        }

    def dm(self, home: str, *arguments: str, code: int | None = 0) -> Ran:
        ran = run_dm(arguments, self.environment(home))
        assert code is None or ran.code == code, f"dm {' '.join(arguments)}: {ran.told()}"
        return ran

    def copy(self, name: str) -> str:
        """A copy of the whole store, to be damaged."""
        home = os.path.join(self.directory, name)
        shutil.rmtree(home, ignore_errors=True)
        shutil.copytree(self.near, home, symlinks=True)
        return home

    def dependants(self, keys: set[bytes]) -> set[bytes]:
        """Those and all whose chains go through one of them."""
        found = set(keys)
        while True:
            more = {key for key, bases in self.bases.items() if bases & found} - found
            if not more:
                return found
            found |= more


def build(directory: str, seed: int, *, dots: int = 2) -> Scene:
    """Dots with branches, tags, a merge, a stash, chains of deltas, a deleted dot, leftovers."""
    scene, chance = Scene(directory), random.Random(seed)
    home = scene.near
    scene.dm(home, "init", "shop")
    tree = scene.dm(home, "dot", "path", "shop").stdout.decode().strip()
    os.makedirs(os.path.join(tree, "d"))
    big = bytearray(chance.randbytes(BIG_BYTES))
    for number in range(VERSIONS):
        at = chance.randrange(BIG_BYTES - 300)
        big[at : at + 300] = chance.randbytes(300)
        _write(tree, "big", bytes(big))
        _write(tree, "d/text", f"version {number}\n".encode() * 200)
        _write(tree, f"d/new{number}", chance.randbytes(500))
        scene.dm(home, "commit", "-m", f"version {number}")
    scene.dm(home, "tag", "light")
    scene.dm(home, "tag", "v1", "-m", "annotated")
    scene.dm(home, "checkout", "-b", "topic", "HEAD~1")
    topic = scene.dm(home, "dot", "path", "shop").stdout.decode().strip()
    _write(topic, "topic", b"on a branch")
    scene.dm(home, "commit", "-m", "topical")
    scene.dm(home, "checkout", "master")
    shutil.copytree(home, scene.older, symlinks=True)
    scene.dm(home, "merge", "topic")
    _write(tree, "d/text", b"put away")
    scene.dm(home, "stash")
    for number in range(1, dots):
        scene.dm(home, "init", f"other{number}")
        path = scene.dm(home, "dot", "path", f"other{number}").stdout.decode().strip()
        _write(path, "file", chance.randbytes(2000))
        scene.dm(home, "commit", "--dot", f"other{number}", "-m", "first of another")
    scene.dm(home, "init", "gone")
    gone = scene.dm(home, "dot", "path", "gone").stdout.decode().strip()
    _write(gone, "file", b"deleted")
    scene.dm(home, "commit", "--dot", "gone", "-m", "to be deleted")
    scene.dm(home, "dot", "delete", "-f", "gone")
    scene.dm(home, "switch", "shop")
    far = os.path.join(directory, "far")
    scene.dm(home, "remote", "add", "far", far)
    _leftovers(scene)
    shutil.copytree(home, far, symlinks=True)
    scene.dm(home, "fsck", "--full")
    scene.truth = survey(home)
    _learn(scene)
    return scene


def _write(tree: str, name: str, content: bytes) -> None:
    with open(os.path.join(tree, name), "wb") as file:
        file.write(content)


def _leftovers(scene: Scene) -> None:
    """What killed commands leave, and what users write."""
    dot = next(path for path in _dot_dirs(scene.near) if os.path.isdir(f"{path}/trees/topic"))
    pack = max(_packs(dot), key=os.path.getsize)
    with open(pack, "rb") as file:
        head = file.read(3000)
    for name, content in {
        f"{dot}/quarantine/0123456789abcdef.part": head,
        f"{scene.near}/transfers/{'ab' * 16}.lock": b"",
        f"{scene.near}/tmp/{'cd' * 16}.lock": b"",
        f"{scene.near}/config.toml": b'[user]\nauthor = "Ada <ada@example.org>"\n',
        f"{scene.near}/known_hosts": b"# none yet\n",
    }.items():
        os.makedirs(os.path.dirname(name), mode=0o700, exist_ok=True)
        with open(name, "wb") as file:
            file.write(content)
        os.chmod(name, 0o600)


def _dot_dirs(home: str) -> list[str]:
    return [entry.path for entry in sorted(os.scandir(f"{home}/dots"), key=lambda e: e.name)]


def _packs(dot: str) -> list[str]:
    return [entry.path for entry in os.scandir(f"{dot}/packs") if entry.name.endswith(".pack")]


def store_files(home: str) -> list[str]:
    """Every file of the store by its path below it, working trees left out."""
    found = []
    for path, directories, names in os.walk(home):
        directories[:] = sorted(name for name in directories if name != "trees")
        found += [os.path.relpath(os.path.join(path, name), home) for name in names]
    return sorted(found)


# --- what it answers ----------------------------------------------------------------------------


def survey(home: str) -> Survey:
    """Everything a store can be asked for, in a fork. An exception without a type is `!!`."""
    lines = in_fork(lambda: [json.dumps(answers_of(home))], patience_s=60)
    try:
        answers: Survey = json.loads(lines[-1])
    except (ValueError, IndexError):
        return {"": f"!!{' '.join(lines)[-400:]}"}
    return answers


def answers_of(home: str) -> Survey:
    """The survey, in this process."""
    answers: Survey = {}
    try:
        with Store.open(home, EngineSettings(author="a", actor="a", lock_wait_s=2)) as store:
            _ask(store, answers)
    except DmError as exc:
        answers[""] = f"!{type(exc).__name__} {exc.message}"
    return answers


def _ask(store: Store, answers: Survey) -> None:
    catalog = store.catalog
    answers["remotes"] = repr([(row.name, row.url) for row in catalog.remotes()])
    for dot in catalog.dots():
        name = f"{dot.namespace}/{dot.name}"
        answers[name] = f"{dot.dot.hex()} {dot.head}"
        refs = catalog.refs(dot.dot)
        answers[f"{name} refs"] = repr([(row.name, row.target.hex()) for row in refs])
        commits: dict[ObjectId, None] = {}
        for ref in refs:
            question = f"{name} log {ref.name}"
            try:
                found = log_commits(store, dot, ref.name)
                answers[question] = repr([(info.id.hex(), info.message) for info in found])
                commits.update((info.id, None) for info in found)
            except DmError as exc:
                answers[question] = f"!{type(exc).__name__} {exc.message}"
        objects = store.objects(dot.dot)
        for commit in commits:
            _read_commit(store, dot.dot, objects, commit, f"{name} {commit.hex()}", answers)


def _read_commit(
    store: Store, dot: object, objects: ObjectStore, commit: ObjectId, name: str, answers: Survey
) -> None:
    try:
        root = store.root(dot, commit)  # type: ignore[arg-type]
        waiting: list[tuple[bytes, Entry]] = [(b"", root)]
    except DmError as exc:
        answers[name] = f"!{type(exc).__name__} {exc.message}"
        return
    while waiting:
        path, entry = waiting.pop()
        question = f"{name} {path.decode()}"
        try:
            if entry.kind is EntryKind.DIRECTORY:
                below = list(_entries(objects, entry.tree))
                answers[question] = repr([child.name for child in below])
                waiting += [(path + b"/" + child.name, child) for child in below]
            elif entry.kind is EntryKind.FILE:
                spans = list(file_spans(objects, entry))
                parts = [objects.read_chunk(s.chunk) for s in spans if s.chunk != ZERO_RUN]
                answers[question] = str(hash_of(b"".join(parts)))
        except DmError as exc:
            answers[question] = f"!{type(exc).__name__} {exc.message}"


def hash_of(data: bytes) -> str:
    from blake3 import blake3

    return blake3(data).hexdigest(16)


def _entries(objects: ObjectStore, tree: ObjectId | None) -> Iterator[Entry]:
    for page in _pages(objects, tree, DIRECTORY):
        if page.level == 0:
            yield from page.items


def _pages(objects: ObjectStore, tree: ObjectId | None, page_type: int) -> Iterator[Page]:
    waiting = [] if tree is None else [tree]
    while waiting:
        page = read_page(objects, waiting.pop(), page_type)
        yield page
        if page.level > 0:
            waiting += reversed([child.page for child in page.items])


# --- what needs what -----------------------------------------------------------------------------


def _learn(scene: Scene) -> None:
    with Store.open(scene.near, EngineSettings(author="a", actor="a", lock_wait_s=2)) as store:
        for dot in store.catalog.dots():
            objects = store.objects(dot.dot)
            for commit in store.catalog.commit_ids(dot.dot):
                name = f"{dot.namespace}/{dot.name} {commit.hex()}"
                root = commit_from_bytes(objects.read_commit(commit)).root
                _learn_tree(scene, objects, name, b"", root, frozenset((short_key(commit),)))
    for dot_dir in _dot_dirs(scene.near):
        for path in _packs(dot_dir):
            _learn_pack(scene, path)


def _learn_tree(
    scene: Scene,
    objects: ObjectStore,
    name: str,
    path: bytes,
    entry: Entry,
    above: frozenset[bytes],
) -> None:
    own = set(above)
    if entry.kind is EntryKind.DIRECTORY:
        own.update(map(short_key, _page_ids(objects, entry.tree, DIRECTORY)))
        for child in _entries(objects, entry.tree):
            _learn_tree(scene, objects, name, path + b"/" + child.name, child, frozenset(own))
    elif entry.kind is EntryKind.FILE:
        own.update(map(short_key, _page_ids(objects, entry.tree, MANIFEST)))
        own.update(short_key(s.chunk) for s in file_spans(objects, entry) if s.chunk != ZERO_RUN)
    scene.needs[f"{name} {path.decode()}"] = frozenset(own)


def _page_ids(objects: ObjectStore, tree: ObjectId | None, page_type: int) -> Iterator[ObjectId]:
    waiting = [] if tree is None else [tree]
    while waiting:
        page_id = waiting.pop()
        yield page_id
        page = read_page(objects, page_id, page_type)
        if page.level > 0:
            waiting += [child.page for child in page.items]


def _learn_pack(scene: Scene, path: str) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        footer, _ = read_footer(fd, os.path.basename(path))
        keys = list(footer.keys)
        found = list(iterate_file_records(fd, HEADER_BYTES, footer.records_end))
    finally:
        os.close(fd)
    name = os.path.relpath(path, scene.near)
    scene.records[name] = [
        (start, end, key) for (_, start, end), key in zip(found, keys, strict=True)
    ]
    for (record, _, _), key in zip(found, keys, strict=True):
        scene.bases.setdefault(key, set()).update(base.key for base in record.bases)
