"""Stores with very long histories, built through the real packs, event log and catalog.

For tests and for tools/bench: `build_history` makes a dot whose commits have empty trees, 100,000
in about five seconds. The same plan gives the same commit ids in every store, so that two stores
share exactly the commits for which `message` says the same.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

from dmsync.core.events import CommitsAdded, DotCreated, Event, RefChanged
from dmsync.core.ids import DotId, Kind, ObjectId
from dmsync.core.objects import ROOT_ENTRY, Commit
from dmsync.engine.settings import EngineSettings
from dmsync.engine.store import Store
from dmsync.storage.layout import Layout

Parents = tuple[int, ...]

DOT = DotId(b"long history dot")
BATCH_COMMITS = 10_000
"""Commits of one operation, and of one pack."""
_STARTED_S = 1_600_000_000


@dataclass(frozen=True)
class History:
    """What was built: `ids` by number, parents before children."""

    home: str
    dot: DotId
    ids: list[ObjectId]


def chain(commits: int) -> Iterator[Parents]:
    """One after the other."""
    for number in range(commits):
        yield (number - 1,) if number else ()


def merged_lanes(commits: int, *, every: int = 28) -> Iterator[Parents]:
    """A mainline in which, every so many commits, a side branch of a third of that is merged."""
    main, side = -1, -1
    for number in range(commits):
        at = number % every
        if main < 0:
            yield ()
            main = number
        elif at == every - 1 and side >= 0:
            yield (main, side)
            main, side = number, -1
        elif at % 3 == 1:
            yield (side if side >= 0 else main,)
            side = number
        else:
            yield (main,)
            main = number


def forked(common: int, heads: int, private: int = 1) -> Iterator[Parents]:
    """A chain of `common` commits; then `heads` chains of `private` commits on its last one."""
    yield from chain(common)
    for head in range(heads):
        for depth in range(private):
            number = common + head * private + depth
            yield (number - 1 if depth else common - 1,)


def build_history(
    store_home: str | os.PathLike[str],
    *,
    commits: int,
    shape: Callable[[int], Iterable[Parents]] | Iterable[Parents] = chain,
    message: Callable[[int], str] = str,
    branches: Mapping[str, int] | None = None,
    dot: DotId = DOT,
    name: str = "long",
    namespace: str = "admin",
    commits_per_operation: int = BATCH_COMMITS,
) -> History:
    """Make the store (unless it is there) and a dot in it of the first `commits` of `shape`.

    `shape` gives each commit's parents by number, each below the commit's own. Commit n's message
    is `message(n)`. `branches` names commits by number; by default `master` is the last one.
    """
    home = os.fspath(store_home)
    plan = iter(shape(commits) if callable(shape) else shape)
    ids: list[ObjectId] = []
    with Store.open(home, EngineSettings(actor="test", author="test"), create=True) as store:
        _append(store, DotCreated(dot, namespace, name, "test"))
        os.makedirs(Layout(home).dot_dir(dot), exist_ok=True)
        while len(ids) < commits:
            count = min(commits_per_operation, commits - len(ids))
            first = len(ids)
            _put_commits(store, dot, islice(plan, count), ids, message)
            _append(store, CommitsAdded(dot, tuple(ids[first:])))
        named = {"master": commits - 1} if branches is None else branches
        _append(
            store,
            *(
                RefChanged(dot, f"branch/{branch}", None, ids[number], "create", "by the builder")
                for branch, number in named.items()
            ),
        )
    return History(home, dot, ids)


def _put_commits(
    store: Store,
    dot: DotId,
    plan: Iterable[Parents],
    ids: list[ObjectId],
    message: Callable[[int], str],
) -> None:
    with store.objects(dot).writer() as writer:
        for parents in plan:
            number = len(ids)
            commit = Commit(
                root=ROOT_ENTRY,
                parents=tuple(ids[parent] for parent in parents),
                author="Ada <ada@example.org>",
                committer="Ada <ada@example.org>",
                time_ns=(_STARTED_S + 60 * number) * 10**9,
                offset_minutes=0,
                message=message(number),
            )
            ids.append(writer.put(Kind.COMMIT, commit.to_bytes()))
        writer.seal()


def _append(store: Store, *events: Event) -> None:
    with store.transaction("test") as transaction:
        for event in events:
            transaction.append(event)
