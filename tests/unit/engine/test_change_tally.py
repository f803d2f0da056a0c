"""Counting changes gives what joining renames in the whole list of them would."""

import random
from dataclasses import replace

import pytest

from dmsync.core.objects import Entry, EntryKind, Layout
from dmsync.engine.change_tally import LISTED_MAX, ChangeTally, tallied
from dmsync.engine.commit_deltas import CHANGES_MAX
from dmsync.engine.differences import Change, with_renames


def an_entry(chance: random.Random) -> Entry:
    entry = Entry(b"f", EntryKind.FILE, 0o644, uid=chance.randrange(3), gid=chance.randrange(3))
    content = chance.choice((b"", b"a", b"b", b"c", b"d" * 32))
    return replace(entry, size=len(content), content=content, layout=Layout.SINGLE)


def random_changes(seed: int, count: int) -> list[Change]:
    chance = random.Random(seed)
    changes = []
    for number in range(count):
        path = b"%d/%d" % (chance.randrange(3), number)
        old, new = an_entry(chance), an_entry(chance)
        kind = chance.choice("+-*")
        changes.append(
            Change(path, kind, None if kind == "+" else old, None if kind == "-" else new)
        )
    chance.shuffle(changes)
    return changes


def counted(changes: list[Change], listed_max: int) -> ChangeTally:
    tally = ChangeTally(listed_max)
    for change in changes:
        tally.add(change)
    return tally


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("count", [0, 1, 2, 30, 200])
def test_the_count_is_that_of_the_list(seed: int, count: int) -> None:
    changes = random_changes(seed, count)
    told = tallied(with_renames(changes))
    assert told.count == len(with_renames(changes))
    for listed_max in (0, 1, 29, 30, 1000):
        found = counted(changes, listed_max).total()
        assert (found.listed is None) == (count > listed_max)
        assert found == replace(told, listed=None if count > listed_max else told.listed)


def test_renames_are_counted_though_no_list_is_kept() -> None:
    changes = random_changes(1, 200)
    assert counted(changes, 0).total().count < 200


def test_whatever_may_be_kept_as_a_delta_is_listed() -> None:
    assert LISTED_MAX >= 2 * CHANGES_MAX, "renames are two changes before they are joined"
