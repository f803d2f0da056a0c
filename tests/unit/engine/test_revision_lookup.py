"""Which commit a revision names, in a real store."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dmsync.core.events import HeadSwitched, RemoteAdded, UndoApplied, UpstreamSet
from dmsync.core.ids import ObjectId
from dmsync.engine import branches
from dmsync.engine.revision_lookup import resolve_range, resolve_revision
from dmsync.engine.store import Store
from dmsync.errors import AmbiguousRevision, RevisionNotFound, UsageError
from dmsync.storage.catalog import DotRow
from tests.support.recorded_histories import Planned, point, record, thin
from tests.support.working_store import Workshop

# 0 - 1 - 3 - 4
#   \ 2 /
FORK = [
    Planned((), message="root", time_s=10),
    Planned((0,), message="left\n\nticket 7", time_s=20),
    Planned((0,), message="right\n\nticket 7", time_s=90),
    Planned((1, 2), message="joined", time_s=40),
    Planned((3,), message="tip", time_s=50),
]


@pytest.fixture
def dot(shop: Workshop, tmp_path: Path) -> DotRow:
    return shop.attach("shop", tmp_path / "data")


@pytest.fixture
def ids(shop: Workshop, dot: DotRow) -> list[ObjectId]:
    made = record(shop.store, dot, FORK)
    point(shop.store, dot, "branch/master", made[4])
    return made


@pytest.fixture
def at(shop: Workshop, dot: DotRow, ids: list[ObjectId]) -> Callable[[str], int]:
    return lambda text: ids.index(resolve_revision(shop.store, dot, text))


def test_steps_lead_back(at: Callable[[str], int]) -> None:
    for text, number in {
        "HEAD": 4, "@": 4, "master^{}": 4, "HEAD^{commit}^": 3, "@~1^2": 2, "@~1^1": 1, "@^^2^": 0,
        "HEAD~3": 0, "@^0": 4, "branch/master~2": 1,
    }.items():  # fmt: skip
        assert at(text) == number, text


@pytest.mark.parametrize("text", ["HEAD~4", "HEAD^2", "HEAD^^3", "nope", "@{9}", "ffffffff"])
def test_what_is_not_there(at: Callable[[str], int], text: str) -> None:
    with pytest.raises(RevisionNotFound):
        at(text)


def test_every_kind_of_ref(
    shop: Workshop, dot: DotRow, ids: list[ObjectId], at: Callable[[str], int]
) -> None:
    point(shop.store, dot, "tag/v1.0", ids[0])
    point(shop.store, dot, "stash/reset-20261121", ids[1])
    point(shop.store, dot, "remote/far/master", ids[2])
    with shop.store.transaction("test") as tx:
        tx.append(RemoteAdded("far", "ssh://h", None))
        tx.append(UpstreamSet(dot.dot, "far", "admin", "shop"))
    assert (at("v1.0"), at("tag/v1.0"), at("stash/reset-20261121")) == (0, 0, 1)
    assert (at("far/master"), at("remote/far/master"), at("master@{u}"), at("@{u}^")) == (
        2,
        2,
        2,
        0,
    )


def test_a_tag_wins_over_a_branch_and_the_user_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    shop = Workshop(tmp_path / "home")
    dot = shop.attach("shop", tmp_path / "data")
    ids = record(shop.store, dot, FORK)
    point(shop.store, dot, "branch/x", ids[0])
    point(shop.store, dot, "tag/x", ids[0])
    shop.close()
    settings = replace(shop.settings, say=said.append)
    with Store.open(str(tmp_path / "home"), settings) as store:
        assert resolve_revision(store, dot, "x") == ids[0]
        assert said == []  # both mean the same
        point(store, dot, "branch/x", ids[1])
        assert resolve_revision(store, dot, "x") == ids[0]
        assert said == ["x could also mean branch/x: tag/x is taken"]


def test_prefixes_also_of_hollow_commits(
    shop: Workshop, dot: DotRow, ids: list[ObjectId], at: Callable[[str], int]
) -> None:
    thin(shop.store, dot, ids[0])
    for number, oid in enumerate(ids):
        assert at(oid.hex()) == at(oid.hex()[:16].upper()) == number


def test_an_ambiguous_prefix_lists_its_candidates(shop: Workshop, dot: DotRow) -> None:
    plan = [Planned((), message=f"  commit {n}\nmore", time_s=60 * n) for n in range(1500)]
    ids = record(shop.store, dot, plan)
    by_prefix: dict[str, list[int]] = {}
    for number, oid in enumerate(ids):
        by_prefix.setdefault(oid.hex()[:4], []).append(number)
    prefix, numbers = next((p, n) for p, n in by_prefix.items() if len(n) > 1)
    with pytest.raises(AmbiguousRevision) as caught:
        resolve_revision(shop.store, dot, prefix)
    candidates = caught.value.facts["candidates"]
    assert isinstance(candidates, list)
    assert {c["id"]: c["subject"] for c in candidates} == {
        ids[n].hex(): f"commit {n}" for n in numbers
    }
    assert candidates[0]["date"].startswith("1970-01-0")
    for number in numbers:
        assert (
            f"commit {number}" in caught.value.hint and ids[number].hex()[:16] in caught.value.hint
        )


def test_text_in_a_message_finds_the_newest_commit_of_any_ref(
    shop: Workshop, dot: DotRow, ids: list[ObjectId], at: Callable[[str], int]
) -> None:
    assert at(":/ticket 7") == 2  # by its date, although an equal generation
    assert at(":/ticket") == 2 and at(":/left") == 1 and at(":/oo") == 0
    (lone,) = record(shop.store, dot, [Planned((), message="ticket 7 as well", time_s=100)])
    with pytest.raises(RevisionNotFound):
        at(":/as well")  # nothing names it
    point(shop.store, dot, "stash/x", lone)
    assert resolve_revision(shop.store, dot, ":/ticket 7") == lone


def test_branches_checked_out_before(
    shop: Workshop, dot: DotRow, ids: list[ObjectId], at: Callable[[str], int]
) -> None:
    with pytest.raises(RevisionNotFound, match="0 times"):
        at("@{-1}")
    branches.reset(shop.store, dot, "HEAD", hard=True)
    branches.create_branch(shop.store, dot, "one", ids[1].hex())
    branches.create_branch(shop.store, dot, "two", ids[2].hex())
    for name in ("one", "one", "two", "master", "two"):
        shop.checkout(dot, name)
    assert [at(f"@{{-{n}}}") for n in (1, 2, 3, 4)] == [4, 2, 1, 4]
    assert at("@{-1}~2") == 1 and at("@{-1}@{0}") == 4
    catalog = shop.store.catalog
    last = next(  # the newest one only says that the tree's switch has finished
        operation
        for operation in catalog.operations_by("checkout")
        if any(isinstance(event, HeadSwitched) for event in catalog.events_of(operation).events)
    )
    with shop.store.transaction("undo") as tx:
        tx.append(UndoApplied(last.first_seq))
    assert at("@{-1}") == 2
    branches.rename_branch(shop.store, dot, "one", "uno")
    with pytest.raises(RevisionNotFound, match="gone"):
        at("@{-2}")
    with pytest.raises(RevisionNotFound, match="3 times"):
        at("@{-9}")


def test_reflog_steps(
    shop: Workshop, dot: DotRow, ids: list[ObjectId], at: Callable[[str], int]
) -> None:
    point(shop.store, dot, "branch/master", ids[3])
    assert (at("@{0}"), at("@{1}"), at("master@{1}^")) == (3, 4, 3)
    assert at("master@{now}") == 3
    for text in ("master@{1971-01-01}", "master@{7}"):
        with pytest.raises(RevisionNotFound):
            at(text)
    with pytest.raises(UsageError):
        at(f"{ids[0].hex()}@{{1}}")


def test_an_unborn_branch_names_nothing(shop: Workshop, dot: DotRow) -> None:
    for text in ("HEAD", "master", "HEAD^{}", "HEAD~1", ":/x"):
        with pytest.raises(RevisionNotFound):
            resolve_revision(shop.store, dot, text)


def test_ranges(shop: Workshop, dot: DotRow, ids: list[ObjectId]) -> None:
    def ends(text: str) -> tuple[list[int], list[int]]:
        wanted, excluded = resolve_range(shop.store, dot, text)
        return [ids.index(w) for w in wanted], [ids.index(e) for e in excluded]

    left, right = ids[1].hex(), ids[2].hex()
    assert ends("HEAD") == ([4], []) and ends("^HEAD~1") == ([], [3])
    assert ends(f"{left}..") == ([4], [1]) and ends(f"..{left}") == ([1], [4])
    assert ends(f"{left}...{right}") == ([1, 2], [0])
    for bad in ("^", "^a..b", "..", "a..b..c"):
        with pytest.raises(UsageError):
            ends(bad)
