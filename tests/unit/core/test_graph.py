import random
from itertools import islice

import pytest

from dmsync.core.graph import (
    ahead_behind,
    ancestors_difference,
    descending,
    is_ancestor,
    merge_bases,
    nth_first_parent,
    reaching_tips,
)
from tests.support.commit_graphs import MemoryGraph


def random_graph(seed, count=60):
    chance, graph, commits = random.Random(seed), MemoryGraph(), []
    for number in chance.sample(range(10_000), count):
        near = commits[-8:]
        parents = chance.sample(near, min(len(near), chance.choice((0, 1, 1, 1, 2, 3))))
        commits.append(graph.add(number, *parents))
    return graph, commits, chance


@pytest.mark.parametrize("seed", range(40))
def test_answers_equal_those_of_plain_ancestor_sets(seed):
    graph, commits, chance = random_graph(seed)
    for _ in range(40):
        a, b, c = chance.choice(commits), chance.choice(commits), chance.choice(commits)
        of_a, of_b = graph.ancestors(a), graph.ancestors(b)
        assert is_ancestor(graph, a, b) == (a in of_b)
        common = of_a & of_b
        maximal = {x for x in common if not any(x in graph.ancestors(y) - {y} for y in common)}
        expected = sorted(maximal, key=lambda x: (-graph.generation(x), x))
        assert merge_bases(graph, a, b) == merge_bases(graph, b, a) == expected
        assert ahead_behind(graph, a, b) == (len(of_a - of_b), len(of_b - of_a))
        listed = list(ancestors_difference(graph, [a, c], [b]))
        assert set(listed) == graph.ancestors(a, c) - of_b and len(set(listed)) == len(listed)
        place = {commit: index for index, commit in enumerate(listed)}
        for commit in listed:
            assert all(place.get(p, -1) < place[commit] for p in graph.parents_of[commit])


@pytest.mark.parametrize("seed", range(10))
def test_nth_first_parent_equals_walking(seed):
    graph, commits, _ = random_graph(seed, 120)
    for commit in commits:
        walked, count = commit, 0
        while walked is not None:
            assert nth_first_parent(graph, commit, count) == walked
            walked = next(iter(graph.parents_of[walked]), None)
            count += 1
        assert nth_first_parent(graph, commit, count) is None


def test_criss_cross_has_both_bases():
    graph = MemoryGraph()
    root = graph.add(1)
    left, right = graph.add(2, root), graph.add(3, root)
    ours, theirs = graph.add(4, left, right), graph.add(5, right, left)
    assert merge_bases(graph, ours, theirs) == [left, right]


def test_unrelated_histories_have_no_base():
    graph = MemoryGraph()
    assert merge_bases(graph, graph.add(1), graph.add(2)) == []


def test_cost_follows_distance():
    graph = MemoryGraph()
    tip = graph.add(0)
    chain = [tip]
    for number in range(1, 20_000):
        chain.append(graph.add(number, chain[-1]))
    for question in (
        lambda: is_ancestor(graph, chain[-11], chain[-1]),
        lambda: merge_bases(graph, chain[-11], chain[-1]),
        lambda: ahead_behind(graph, chain[-11], chain[-1]),
        lambda: list(ancestors_difference(graph, [chain[-1]], [chain[-11]])),
        lambda: nth_first_parent(graph, chain[-1], 15_000),
    ):
        graph.visited = 0
        question()
        assert graph.visited < 80


def test_a_walk_reads_only_as_far_as_it_is_asked():
    graph = MemoryGraph()
    chain = [graph.add(0)]
    for number in range(1, 5000):
        chain.append(graph.add(number, chain[-1]))
    graph.visited = 0
    assert list(islice(descending(graph, [chain[-1]]), 10)) == chain[:-11:-1]
    assert graph.visited <= 10


def test_a_walk_follows_only_the_parents_it_is_told():
    graph = MemoryGraph()
    root = graph.add(1)
    side, main = graph.add(2, root), graph.add(3, root)
    tip = graph.add(4, main, side)
    first = descending(graph, [tip], lambda commit: graph.parents(commit)[:1])
    assert list(first) == [tip, main, root]


def test_each_commit_knows_the_tips_that_reach_it():
    graph = MemoryGraph()
    root = graph.add(1)
    left, right = graph.add(2, root), graph.add(3, root)
    tip = graph.add(4, left)
    assert list(reaching_tips(graph, [tip, right, tip])) == [
        (tip, 0b101), (left, 0b101), (right, 0b010), (root, 0b111),
    ]  # fmt: skip
