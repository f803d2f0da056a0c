"""What a tree changed against another, as far as a commit needs it: how much, whose files, and the
changes themselves while they are few. Memory does not follow the number of changes, but for eight
bytes of each that might be half of a rename.
"""

from array import array
from collections.abc import Iterable
from typing import Final

from dmsync.core.values import value_type
from dmsync.engine.differences import Change, is_distinctive, with_renames

LISTED_MAX: Final = 20_000
"""Twice the changes of the longest commit delta: renames are two of these and one of those."""


@value_type
class TalliedChanges:
    """Changes with renames joined. `listed` are all of them by path, None when there are many.
    `uids` and `gids`: owners of what is new or changed."""

    count: int
    listed: list[Change] | None
    uids: frozenset[int]
    gids: frozenset[int]


class ChangeTally:
    """Takes changes one by one, in any order, renames as additions and removals."""

    def __init__(self, listed_max: int = LISTED_MAX) -> None:
        self._listed_max = listed_max
        self._listed: list[Change] | None = []
        self._count = 0
        self._uids: set[int] = set()
        self._gids: set[int] = set()
        self._added = array("q")
        self._removed = array("q")
        """Hashes of what tells a file's content, for counting renames when no list does."""

    def add(self, change: Change) -> None:
        self._count += 1
        if change.new is not None:
            self._uids.add(change.new.uid)
            self._gids.add(change.new.gid)
        if self._listed is None:
            self._note_content(change)
            return
        self._listed.append(change)
        if self._count > self._listed_max:
            for listed in self._listed:
                self._note_content(listed)
            self._listed = None

    def _note_content(self, change: Change) -> None:
        if change.kind == "+" and change.new is not None and is_distinctive(change.new):
            self._added.append(hash((change.new.size, change.new.content)))
        elif change.kind == "-" and change.old is not None and is_distinctive(change.old):
            self._removed.append(hash((change.old.size, change.old.content)))

    def total(self) -> TalliedChanges:
        """What was added so far."""
        listed = None if self._listed is None else with_renames(self._listed)
        count = self._count - self._renames_count() if listed is None else len(listed)
        return TalliedChanges(count, listed, frozenset(self._uids), frozenset(self._gids))

    def _renames_count(self) -> int:
        """`with_renames` joins as many files of one content as were both added and removed."""
        if not self._added or not self._removed:
            return 0
        added, removed = sorted(self._added), sorted(self._removed)
        found = at = 0
        for content in removed:
            while at < len(added) and added[at] < content:
                at += 1
            if at < len(added) and added[at] == content:
                found += 1
                at += 1
        return found


def tallied(changes: Iterable[Change]) -> TalliedChanges:
    """Changes with renames joined that are all at hand."""
    listed = list(changes)
    new = [change.new for change in listed if change.new is not None]
    return TalliedChanges(
        len(listed), listed, frozenset(e.uid for e in new), frozenset(e.gid for e in new)
    )
