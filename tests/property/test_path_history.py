"""Random histories of a few files: `log -- PATH` lists what git lists, and blame what a model says.

DM_TEST_LONG=1 tries twenty times as many.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmsync.core.ids import ObjectId
from dmsync.engine.blame import blame
from dmsync.engine.log import LogQuery, find_commits
from tests.support.commit_graphs import GitGraph, Model, Shape, examples, numbers_of, shapes
from tests.support.recorded_histories import Planned, record
from tests.support.working_store import Workshop

PATHS = (b"a", b"d/b", b"d/e/c", b"d/e/f", b"g/h")
ASKED = ((b"a",), (b"d",), (b"d/e",), (b"d/e/c",), (b"a", b"g/h"), (b"absent",), (b"d/b", b"g"))


def random_files(shape: Shape, chance: random.Random) -> list[dict[bytes, bytes]]:
    """The content of each commit: mostly a parent's, with few values, so that sides agree."""
    contents: list[dict[bytes, bytes]] = []
    for parents in shape:
        files: dict[bytes, bytes] = {}
        for path in PATHS:
            chosen = contents[chance.choice(parents)].get(path) if parents else None
            if chance.random() < (0.15 if parents else 0.7):
                chosen = chance.choice((None, b"1", b"2", b"3"))
            if chosen is not None:
                files[path] = chosen
        contents.append(files)
    return contents


class Both:
    """The same history in a store and in git."""

    def __init__(self, directory: Path, shape: Shape, chance: random.Random) -> None:
        self.shape = shape
        self.files = random_files(shape, chance)
        plan = [
            Planned(parents, files, str(number), directory_time_ns=chance.randrange(3))
            for number, (parents, files) in enumerate(zip(shape, self.files, strict=True))
        ]
        self.shop = Workshop(directory / "store")
        self.dot = self.shop.attach("app", directory / "tree")
        self.ids: list[ObjectId] = record(self.shop.store, self.dot, plan)
        (directory / "git").mkdir()
        self.git = GitGraph(directory / "git", shape, files=self.files)

    def log(self, revisions: tuple[str, ...], paths: tuple[bytes, ...], first: bool) -> list[int]:
        query = LogQuery(revisions=revisions, paths=paths, first_parent=first)
        found = find_commits(self.shop.store, self.dot, query)
        assert found.unknown_count == 0
        return [int(info.message) for info in found.commits]

    def model(
        self, wanted: list[int], paths: tuple[bytes, ...], excluded: Sequence[int] = ()
    ) -> set[int]:
        """git's default simplification, as its documentation words it."""
        within = set(numbers_of(Model(self.shape).reachable(wanted, excluded)))
        listed: set[int] = set()
        seen: set[int] = set()
        pending = [number for number in wanted if number in within]
        while pending:
            number = pending.pop()
            if number in seen:
                continue
            seen.add(number)
            mine = _below(self.files[number], paths)
            parents = self.shape[number]
            same = [p for p in parents if _below(self.files[p], paths) == mine]
            relevant = [p for p in parents if p in within or p in excluded]
            chosen = [p for p in relevant if p in same][:1]
            is_new = set(parents) != set(same) if parents else bool(mine)
            if not chosen and (relevant or is_new):
                listed.add(number)
            pending += [p for p in chosen or parents if p in within]
        return listed


def _below(files: dict[bytes, bytes], paths: tuple[bytes, ...]) -> dict[bytes, bytes]:
    return {
        path: content
        for path, content in files.items()
        if any(path == above or path.startswith(above + b"/") for above in paths)
    }


def check_log(both: Both, chance: random.Random) -> None:
    hexes = [oid.hex() for oid in both.ids]
    for asked in ASKED:
        a, b, c = (chance.randrange(len(both.shape)) for _ in range(3))
        listed = both.log((hexes[a], hexes[b]), asked, False)
        assert len(set(listed)) == len(listed)
        assert (
            set(listed) == set(both.git.rev_list([a, b], paths=asked)) == both.model([a, b], asked)
        )
        first = both.git.rev_list([a], (), "--first-parent", paths=asked)
        assert both.log((hexes[a],), asked, True) == first
        # Not git here: whether it takes a parent for excluded depends on what it has read so far.
        listed = both.log((hexes[a], hexes[b], f"^{hexes[c]}"), asked, False)
        assert len(set(listed)) == len(listed)
        assert set(listed) == both.model([a, b], asked, excluded=[c])


def blamed_by_model(both: Both, number: int, path: bytes) -> int:
    """Follow the first parent that has the same content until none has."""
    while True:
        same = [
            p for p in both.shape[number] if both.files[p].get(path) == both.files[number][path]
        ]
        if not same:
            return number
        number = same[0]


def check_blame(both: Both, chance: random.Random) -> None:
    number = chance.randrange(len(both.shape))
    tip = both.ids[number].hex()
    found = blame(both.shop.store, both.dot, tip, recursive=True)
    assert {blamed.path: int(blamed.commit.message) for blamed in found} == {
        path: blamed_by_model(both, number, path) for path in both.files[number]
    }
    assert [blamed.path for blamed in found] == sorted(both.files[number])


@given(shapes(18), st.randoms(use_true_random=False))
@settings(
    max_examples=examples(12),
    deadline=None,
    suppress_health_check=(HealthCheck.too_slow, HealthCheck.data_too_large),
)
def test_path_filter_lists_what_git_lists_and_blame_what_the_model_says(
    shape: Shape, chance: random.Random
) -> None:
    with TemporaryDirectory() as directory:
        both = Both(Path(directory), shape, chance)
        check_log(both, chance)
        for _ in range(5):
            check_blame(both, chance)
        both.shop.close()
