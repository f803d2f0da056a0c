"""Commit graphs of any shape: in memory, in a real catalog, in git, and as a brute-force model.

A shape is a list: entry n holds the numbers of commit n's parents, all below n.
"""

import os
import random
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from hypothesis import strategies as st

from dmsync.core import events as ev
from dmsync.core.graph import jumps_far
from dmsync.core.ids import DotId, Kind, ObjectId, object_id
from dmsync.core.objects import ROOT_ENTRY, Commit
from dmsync.storage.catalog import Catalog
from tests.support.event_histories import CommitShelf, make_store, open_catalog

Shape = list[tuple[int, ...]]

IS_LONG = os.environ.get("DM_TEST_LONG") == "1"
DOT = DotId(b"d" * 16)
_SECONDS_BASE = 1_000_000_000


def examples(usual: int) -> int:
    """How many examples to try: twenty times as many with DM_TEST_LONG=1."""
    return usual * 20 if IS_LONG else usual


# --- shapes --------------------------------------------------------------------------------------


@st.composite
def shapes(draw: st.DrawFn, most: int = 40) -> Shape:
    """Small graphs: several roots, merges, criss-crosses, octopuses of up to 4 parents."""
    shape: Shape = []
    for number in range(draw(st.integers(1, most))):
        near = range(max(0, number - 6), number)
        parents = draw(st.lists(st.sampled_from(near), unique=True, max_size=4)) if near else []
        shape.append(tuple(parents))
    return shape


def random_shape(seed: int, count: int, *, lanes: int = 6) -> Shape:
    """A long graph as people make them: lanes that run on, fork, merge and cross each other."""
    chance = random.Random(seed)
    shape: Shape = []
    tips: list[int] = []
    while len(shape) < count:
        number = len(shape)
        what = chance.random()
        if not tips or (what < 0.002 and len(tips) < lanes):
            shape.append(())
            tips.append(number)
        elif what < 0.10 and len(tips) >= 2:  # criss-cross: two merges of the same two tips
            left, right = chance.sample(range(len(tips)), 2)
            shape.append((tips[left], tips[right]))
            shape.append((tips[right], tips[left]))
            tips[left], tips[right] = number, number + 1
        elif what < 0.25 and len(tips) >= 2:
            merged = chance.sample(tips, chance.randint(2, min(4, len(tips))))
            shape.append(tuple(merged))
            tips[tips.index(merged[0])] = number
            if len(tips) > 2 and chance.random() < 0.5:
                tips.remove(merged[1])
        elif what < 0.35 and len(tips) < lanes:
            old = chance.randrange(max(0, number - 200), number)
            shape.append((old,))
            tips.append(number)
        else:
            lane = chance.randrange(len(tips))
            shape.append((tips[lane],))
            tips[lane] = number
    return shape[:count]


def criss_cross(times: int) -> Shape:
    """A fork whose two sides merge each other again and again: 2**times ways to the root."""
    shape: Shape = [(), (0,), (0,)]
    for _ in range(times):
        left, right = len(shape) - 2, len(shape) - 1
        shape += [(left, right), (right, left)]
    return shape


# --- the brute-force model -------------------------------------------------------------------------


class Model:
    """Answers from whole ancestor sets, one bit a commit; shares nothing with core.graph."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.ancestors: list[int] = []
        self.generations: list[int] = []
        for number, parents in enumerate(shape):
            bits = 1 << number
            for parent in parents:
                bits |= self.ancestors[parent]
            self.ancestors.append(bits)
            self.generations.append(1 + max((self.generations[p] for p in parents), default=0))

    def is_ancestor(self, ancestor: int, descendant: int) -> bool:
        return bool(self.ancestors[descendant] >> ancestor & 1)

    def merge_bases(self, ours: int, theirs: int) -> set[int]:
        common = self.ancestors[ours] & self.ancestors[theirs]
        below = 0
        for number in numbers_of(common):
            if not below >> number & 1:
                below |= self.ancestors[number] ^ (1 << number)
        return set(numbers_of(common & ~below))

    def reachable(self, wanted: Sequence[int], excluded: Sequence[int] = ()) -> int:
        bits = 0
        for number in wanted:
            bits |= self.ancestors[number]
        for number in excluded:
            bits &= ~self.ancestors[number]
        return bits

    def nth_first_parent(self, number: int, count: int) -> int | None:
        for _ in range(count):
            if not self.shape[number]:
                return None
            number = self.shape[number][0]
        return number


def numbers_of(bits: int) -> Iterator[int]:
    """Highest first."""
    while bits:
        number = bits.bit_length() - 1
        yield number
        bits ^= 1 << number


# --- in memory -------------------------------------------------------------------------------------


class MemoryGraph:
    """A GraphView over a dictionary; counts what is asked about."""

    def __init__(self) -> None:
        self.parents_of: dict[ObjectId, tuple[ObjectId, ...]] = {}
        self.generations: dict[ObjectId, int] = {}
        self.depths: dict[ObjectId, int] = {}
        self.jumps: dict[ObjectId, ObjectId] = {}
        self.visited = 0

    def add(self, number: int, *parents: ObjectId) -> ObjectId:
        oid = ObjectId(number.to_bytes(32, "big"))
        self.parents_of[oid] = parents
        self.generations[oid] = 1 + max((self.generations[p] for p in parents), default=0)
        self.depths[oid] = 1 + self.depths[parents[0]] if parents else 0
        if parents:
            first = parents[0]
            second = self.jumps[first]
            third = self.jumps[second]
            far = jumps_far(self.depths[first], self.depths[second], self.depths[third])
            self.jumps[oid] = third if far else first
        else:
            self.jumps[oid] = oid
        return oid

    def has(self, commit: ObjectId) -> bool:
        return commit in self.parents_of

    def parents(self, commit: ObjectId) -> tuple[ObjectId, ...]:
        self.visited += 1
        return self.parents_of[commit]

    def generation(self, commit: ObjectId) -> int:
        return self.generations[commit]

    def first_parent_depth(self, commit: ObjectId) -> int:
        return self.depths[commit]

    def jump(self, commit: ObjectId) -> ObjectId:
        self.visited += 1
        return self.jumps[commit]

    def ancestors(self, *commits: ObjectId) -> set[ObjectId]:
        seen: set[ObjectId] = set()
        stack = list(commits)
        while stack:
            commit = stack.pop()
            if commit not in seen:
                seen.add(commit)
                stack.extend(self.parents_of[commit])
        return seen


def memory_graph(shape: Shape, seed: int = 0) -> tuple[MemoryGraph, list[ObjectId]]:
    """The graph and its ids by number; ids are in no relation to the numbers."""
    graph = MemoryGraph()
    ids: list[ObjectId] = []
    names = list(range(len(shape)))
    random.Random(seed).shuffle(names)
    for name, parents in zip(names, shape, strict=True):
        ids.append(graph.add(name, *(ids[parent] for parent in parents)))
    return graph, ids


# --- in a real catalog -------------------------------------------------------------------------------


def graph_in_catalog(home: Path, shape: Shape) -> tuple[Catalog, list[ObjectId]]:
    """A store whose dot DOT has these commits; the caller closes the catalog."""
    make_store(home)
    shelf = CommitShelf()
    ids: list[ObjectId] = []
    for number, parents in enumerate(shape):
        of = tuple(ids[parent] for parent in parents)
        commit = Commit(ROOT_ENTRY, of, "a <a@b>", "a <a@b>", number, 0, f"commit {number}")
        payload = commit.to_bytes()
        ids.append(object_id(Kind.COMMIT, payload))
        shelf.payloads[DOT, ids[-1]] = payload
    catalog = open_catalog(home, shelf)
    with catalog.transaction("test", "me", b"1" * 16) as tx:
        tx.append(ev.DotCreated(DOT, "admin", "app", "me"))
        for start in range(0, len(ids), 5000):
            tx.append(ev.CommitsAdded(DOT, tuple(ids[start : start + 5000])))
    return catalog, ids


# --- in git -----------------------------------------------------------------------------------------


class GitGraph:
    """The same graph in a git repository, made by `git fast-import`.

    `dates` says how committer dates go: "rising", "equal" or "reversed". `files` holds the whole
    content of each commit; without it all commits have the same, none.
    """

    def __init__(
        self,
        directory: Path,
        shape: Shape,
        *,
        dates: str = "rising",
        files: Sequence[dict[bytes, bytes]] | None = None,
    ) -> None:
        self.directory = directory
        self.git("init", "--quiet", "--bare")
        marks = directory / "marks"
        stream = b"".join(self._stream(shape, dates, files))
        self.git("fast-import", "--quiet", "--force", f"--export-marks={marks}", given=stream)
        by_mark = dict(line.split() for line in marks.read_text().splitlines())
        self.ids = [by_mark[f":{number + 1}"] for number in range(len(shape))]
        self.numbers = {sha: number for number, sha in enumerate(self.ids)}

    def _stream(
        self, shape: Shape, dates: str, files: Sequence[dict[bytes, bytes]] | None
    ) -> Iterator[bytes]:
        for number, parents in enumerate(shape):
            order = {"rising": number, "equal": 0, "reversed": -number}[dates]
            author = random.Random(number).randrange(10**6)
            yield b"reset refs/heads/x\n\n"
            yield b"commit refs/heads/x\nmark :%d\n" % (number + 1)
            yield b"author A <a@b> %d +0000\n" % (_SECONDS_BASE + author)
            yield b"committer A <a@b> %d +0000\n" % (_SECONDS_BASE + order)
            message = b"commit %d" % number
            yield b"data %d\n%s\n" % (len(message), message)
            for position, parent in enumerate(parents):
                yield b"%s :%d\n" % (b"merge" if position else b"from", parent + 1)
            yield b"deleteall\n"
            for path, content in (files[number] if files else {}).items():
                yield b'M 100644 inline "%s"\ndata %d\n%s\n' % (path, len(content), content)
            yield b"\n"

    def _run(self, *arguments: str, given: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
        environment = {
            "PATH": os.environ["PATH"],
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_DIR": str(self.directory),
        }
        return subprocess.run(
            ["git", *arguments], input=given, capture_output=True, env=environment
        )

    def git(self, *arguments: str, given: bytes = b"", code: int = 0) -> str:
        """Output of a git command that ended with 0 or `code`."""
        done = self._run(*arguments, given=given)
        assert done.returncode in (0, code), (arguments, done.stderr)
        return done.stdout.decode()

    def _found(self, text: str) -> list[int]:
        return [self.numbers[sha] for sha in text.split()]

    def merge_bases(self, ours: int, theirs: int) -> set[int]:
        return set(
            self._found(self.git("merge-base", "--all", self.ids[ours], self.ids[theirs], code=1))
        )

    def is_ancestor(self, ancestor: int, descendant: int) -> bool:
        done = self._run("merge-base", "--is-ancestor", self.ids[ancestor], self.ids[descendant])
        assert done.returncode in (0, 1), done.stderr
        return done.returncode == 0

    def rev_list(
        self,
        wanted: Sequence[int],
        excluded: Sequence[int] = (),
        *options: str,
        paths: Sequence[bytes] = (),
    ) -> list[int]:
        named = [self.ids[n] for n in wanted] + [f"^{self.ids[n]}" for n in excluded]
        after = ["--", *map(os.fsdecode, paths)] if paths else []
        return self._found(self.git("rev-list", *options, *named, *after))

    def rev_parse(self, number: int, suffix: str) -> int | None:
        text = self.git("rev-parse", "--verify", "--quiet", f"{self.ids[number]}{suffix}", code=1)
        return self._found(text)[0] if text else None
