"""Random histories: core.graph agrees with a brute-force model and with git on the same graph.

DM_TEST_LONG=1 tries twenty times as many.
"""

import random
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dmsync.core.graph import (
    GraphView,
    ahead_behind,
    ancestors_difference,
    descending,
    difference_count,
    is_ancestor,
    merge_bases,
    nth_first_parent,
    reaching_tips,
)
from dmsync.core.ids import ObjectId
from dmsync.storage.catalog_graph import CatalogGraph
from tests.support.commit_graphs import (
    DOT,
    GitGraph,
    Model,
    Shape,
    criss_cross,
    examples,
    graph_in_catalog,
    memory_graph,
    numbers_of,
    random_shape,
    shapes,
)

SLOW_IS_FINE = (HealthCheck.too_slow, HealthCheck.data_too_large)
LARGE = 10_000


class Checked:
    """A graph under test beside its model; commits are numbers outside of it."""

    def __init__(self, view: GraphView, ids: list[ObjectId], model: Model) -> None:
        self.view, self.ids, self.model = view, ids, model
        self.numbers = {oid: number for number, oid in enumerate(ids)}

    def pair(self, a: int, b: int) -> None:
        """All questions about two commits."""
        ours, theirs = self.ids[a], self.ids[b]
        assert is_ancestor(self.view, ours, theirs) == self.model.is_ancestor(a, b)
        found = merge_bases(self.view, ours, theirs)
        assert found == merge_bases(self.view, theirs, ours)
        assert {self.numbers[oid] for oid in found} == self.model.merge_bases(a, b)
        assert len(set(found)) == len(found)
        assert found == sorted(found, key=lambda oid: (-self.view.generation(oid), oid))
        of_a, of_b = self.model.ancestors[a], self.model.ancestors[b]
        expected = ((of_a & ~of_b).bit_count(), (of_b & ~of_a).bit_count())
        assert ahead_behind(self.view, ours, theirs) == expected

    def range(self, wanted: list[int], excluded: list[int]) -> None:
        """A range holds exactly what it should, each once, parents before children."""
        of = self.ids
        found = list(
            ancestors_difference(self.view, [of[n] for n in wanted], [of[n] for n in excluded])
        )
        assert self._bits(found) == self.model.reachable(wanted, excluded)
        self._assert_parents_first(found)
        count = difference_count(self.view, [of[n] for n in wanted], [of[n] for n in excluded])
        assert count == len(found)

    def log(self, tips: list[int]) -> None:
        """The log's order: children before parents, each once, all there."""
        found = list(descending(self.view, [self.ids[n] for n in tips]))
        assert self._bits(found) == self.model.reachable(tips)
        self._assert_parents_first(found[::-1])
        assert found == sorted(found, key=lambda oid: (-self.view.generation(oid), oid))

    def tips(self, tips: list[int]) -> None:
        for oid, mask in reaching_tips(self.view, [self.ids[n] for n in tips]):
            number = self.numbers[oid]
            expected = [self.model.is_ancestor(number, tip) for tip in tips]
            assert [bool(mask >> n & 1) for n in range(len(tips))] == expected

    def first_parents(self, number: int, count: int) -> None:
        expected = self.model.nth_first_parent(number, count)
        found = nth_first_parent(self.view, self.ids[number], count)
        assert (None if found is None else self.numbers[found]) == expected

    def _bits(self, found: list[ObjectId]) -> int:
        assert len(set(found)) == len(found)
        bits = 0
        for oid in found:
            bits |= 1 << self.numbers[oid]
        return bits

    def _assert_parents_first(self, found: list[ObjectId]) -> None:
        place = {self.numbers[oid]: index for index, oid in enumerate(found)}
        for number, index in place.items():
            assert all(place.get(parent, -1) < index for parent in self.model.shape[number])


def in_memory(shape: Shape, seed: int = 0) -> Checked:
    view, ids = memory_graph(shape, seed)
    return Checked(view, ids, Model(shape))


def ask_everything(checked: Checked, chance: random.Random, count: int) -> None:
    size = len(checked.ids)
    for _ in range(count):
        a, b, c, d = (chance.randrange(size) for _ in range(4))
        checked.pair(a, b)
        checked.range([a, b], [c])
        checked.range([a], [b, c])
        checked.log([a, d])
        checked.tips([a, b, c, a])
        for steps in (0, 1, chance.randrange(size + 1)):
            checked.first_parents(a, steps)


def assert_reachable_counts(graph: CatalogGraph, ids: list[ObjectId], model: Model) -> None:
    """Counted once, when a commit was added, from its parents' counts."""
    for number, oid in enumerate(ids):
        assert graph.reachable_count(oid) == model.ancestors[number].bit_count()


@given(shapes(), st.randoms(use_true_random=False))
@settings(max_examples=examples(150), deadline=None, suppress_health_check=SLOW_IS_FINE)
def test_small_graphs_agree_with_the_model(shape: Shape, chance: random.Random) -> None:
    ask_everything(in_memory(shape, chance.randrange(1000)), chance, 6)


@given(shapes(), st.randoms(use_true_random=False))
@settings(max_examples=examples(10), deadline=None, suppress_health_check=SLOW_IS_FINE)
def test_graphs_in_a_real_catalog_agree_with_the_model(shape: Shape, chance: random.Random) -> None:
    with TemporaryDirectory() as directory:
        catalog, ids = graph_in_catalog(Path(directory) / "store", shape)
        with catalog:
            ask_everything(Checked(catalog.graph(DOT), ids, Model(shape)), chance, 6)
            assert_reachable_counts(catalog.graph(DOT), ids, Model(shape))


@pytest.mark.parametrize("seed", range(examples(1)))
def test_ten_thousand_commits_agree_with_the_model(seed: int, tmp_path: Path) -> None:
    shape = random_shape(seed, LARGE)
    assert any(len(parents) == 4 for parents in shape) and shape.count(()) > 1
    chance = random.Random(seed)
    in_order = in_memory(shape, seed)
    ask_everything(in_order, chance, 8)
    for _ in range(60):  # neighbours, where walks must end early and still be right
        a = chance.randrange(200, LARGE)
        in_order.pair(a, a - chance.randrange(200))
    catalog, ids = graph_in_catalog(tmp_path / "store", shape)
    with catalog:
        ask_everything(Checked(catalog.graph(DOT), ids, in_order.model), chance, 3)
        assert_reachable_counts(catalog.graph(DOT), ids, in_order.model)


def ask_git(
    shape: Shape, git: GitGraph, chance: random.Random, count: int, *, ranges: bool
) -> None:
    view, ids = memory_graph(shape, 1)
    numbers = {oid: number for number, oid in enumerate(ids)}
    for _ in range(count):
        a, b, c = (chance.randrange(len(shape)) for _ in range(3))
        found = {numbers[oid] for oid in merge_bases(view, ids[a], ids[b])}
        assert found == git.merge_bases(a, b)
        assert is_ancestor(view, ids[a], ids[b]) == git.is_ancestor(a, b)
        up, steps = chance.randrange(5), chance.randrange(len(shape))
        back = nth_first_parent(view, ids[a], steps)
        assert (None if back is None else numbers[back]) == git.rev_parse(a, f"~{steps}")
        parents = view.parents(ids[a])
        nth = ids[a] if up == 0 else parents[up - 1] if up <= len(parents) else None
        assert (None if nth is None else numbers[nth]) == git.rev_parse(a, f"^{up}")
        if not ranges:
            continue
        within = ancestors_difference(view, [ids[a], ids[b]], [ids[c]])
        listed = git.rev_list([a, b], [c])
        assert len(set(listed)) == len(listed) and {numbers[oid] for oid in within} == set(listed)
        first = descending(view, [ids[a]], lambda oid: view.parents(oid)[:1])
        assert [numbers[oid] for oid in first] == git.rev_list([a], (), "--first-parent")


@pytest.mark.parametrize("dates", ["rising", "equal", "reversed"])
def test_small_graphs_agree_with_git(dates: str) -> None:
    @given(shapes(25), st.randoms(use_true_random=False))
    @settings(max_examples=examples(8), deadline=None, suppress_health_check=SLOW_IS_FINE)
    def check(shape: Shape, chance: random.Random) -> None:
        with TemporaryDirectory() as directory:
            git = GitGraph(Path(directory), shape, dates=dates)
            # git walks ranges by date and may stop too early when children are older.
            ask_git(shape, git, chance, 4, ranges=dates != "reversed")

    check()


def test_ten_thousand_commits_agree_with_git(tmp_path: Path) -> None:
    shape = random_shape(77, LARGE)
    tmp_path.joinpath("git").mkdir()
    ask_git(shape, GitGraph(tmp_path / "git", shape), random.Random(5), 12, ranges=True)


def test_a_thousandfold_criss_cross_is_answered_at_once(tmp_path: Path) -> None:
    """2**1000 ways lead from the tips to the root; the cost is that of the commits."""
    shape = criss_cross(1000)
    checked = in_memory(shape)
    left, right = len(shape) - 2, len(shape) - 1
    started = time.monotonic()
    checked.pair(left, right)
    checked.pair(0, right)
    checked.pair(left, 1)
    checked.range([left, right], [0])
    checked.log([left, right])
    assert time.monotonic() - started < 5
    assert checked.model.merge_bases(left, right) == {left - 2, right - 2}
    catalog, ids = graph_in_catalog(tmp_path / "store", shape)
    with catalog:
        Checked(catalog.graph(DOT), ids, checked.model).pair(left, right)


def test_a_merge_base_reads_nothing_older_than_the_parents_of_what_is_not_shared() -> None:
    shape = random_shape(3, LARGE)
    view, ids = memory_graph(shape)
    model = Model(shape)
    chance = random.Random(4)
    for _ in range(20):
        a = chance.randrange(1000, LARGE)
        b = a - chance.randrange(1, 100)
        unshared = model.ancestors[a] ^ model.ancestors[b]
        needed = unshared | sum(1 << base for base in model.merge_bases(a, b))
        reached = {parent for number in numbers_of(needed) for parent in shape[number]}
        oldest = min(model.generations[number] for number in reached)
        both = model.reachable([a, b])
        view.visited = 0
        merge_bases(view, ids[a], ids[b])
        assert view.visited <= sum(model.generations[n] >= oldest for n in numbers_of(both))


def test_the_model_itself_on_a_graph_done_by_hand() -> None:
    model = Model([(), (0,), (0,), (1, 2), (2, 1), (3,), ()])
    assert model.merge_bases(5, 4) == {1, 2} and model.merge_bases(5, 6) == set()
    assert model.is_ancestor(0, 5) and not model.is_ancestor(4, 5)
    assert list(numbers_of(model.reachable([5], [2]))) == [5, 3, 1]
    assert model.nth_first_parent(5, 3) == 0 and model.nth_first_parent(5, 4) is None
