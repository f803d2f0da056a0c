"""Types of arguments that a shell can complete: names that the store knows.

Completion never fails and never prints: without a store, or with a broken one, nothing is offered.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Final

import click

from dmsync.surfaces.cli.invocation import FileName, Invocation

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from dmsync.engine.store import Store

_OFFERED_MAX = 500
_RANGE_START: Final = re.compile(r"(?:.*\.\.\.?|\^)", re.DOTALL)
"""What may stand before the last revision of a range."""
_PATHS_FOLLOW: Final = "dmsync.paths-follow"

Names = Callable[["Store", str | None], Iterator[str]]
"""What can be named, given the store and the dot asked for (--dot or DM_DOT, or None)."""


def paths_follow(context: click.Context) -> None:
    """Note that the line has its `--`: what comes then is a path of a tree, not a name."""
    context.meta[_PATHS_FOLLOW] = True


class StoredName(click.types.StringParamType):
    """Text, completed from what is in the store; a list of several is fine."""

    def __init__(self, names: Names) -> None:
        self._names = names

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> "list[CompletionItem]":
        """Names that begin with what was typed."""
        return [] if _PATHS_FOLLOW in ctx.meta else self._offered(ctx, incomplete)

    def _offered(self, context: click.Context, incomplete: str) -> "list[CompletionItem]":
        return _items(name for name in self._stored(context) if name.startswith(incomplete))

    def _stored(self, context: click.Context) -> list[str]:
        from dmsync.engine.store import Store

        invocation = context.find_object(Invocation)
        assert invocation is not None, "main gives the root context one"
        try:
            settings = invocation.settings
            dot = context.params.get("dot") or settings.dot
            with Store.open(settings.home, settings.engine) as store:
                return list(self._names(store, dot))
        except Exception:  # noqa: BLE001 - whatever is wrong, the next command says it
            return []


def _items(names: Iterable[str]) -> "list[CompletionItem]":
    from itertools import islice

    from click.shell_completion import CompletionItem

    return [CompletionItem(name) for name in islice(names, _OFFERED_MAX)]


class _Range(StoredName):
    """`REV`, and the last revision of `A..B`, `A...B` and `^REV`."""

    def _offered(self, context: click.Context, incomplete: str) -> "list[CompletionItem]":
        before = _RANGE_START.match(incomplete)
        start = before[0] if before else ""
        typed = incomplete.removeprefix(start)
        return _items(start + name for name in self._stored(context) if name.startswith(typed))


class _Place(StoredName, FileName):
    """`REV:PATH` as the bytes it was typed in; REV is completed, up to its colon."""

    def _offered(self, context: click.Context, incomplete: str) -> "list[CompletionItem]":
        return _items(f"{n}:" for n in self._stored(context) if n.startswith(incomplete))


class _FirstRevision(StoredName, FileName):
    """`[REV --] PATH...`: as the first word a revision is offered."""

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> "list[CompletionItem]":
        return [] if _given(ctx, param) else super().shell_complete(ctx, param, incomplete)


class Words(click.types.StringParamType):
    """Several words of different meaning: each is completed as its type says; None is a new name.

    Words beyond the last type are completed as the last one is.
    """

    def __init__(self, *types: StoredName | None) -> None:
        self._types = types

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> "list[CompletionItem]":
        """What the type of this word offers."""
        types = self.types_here(ctx)
        found = types[min(len(_given(ctx, param)), len(types) - 1)]
        return [] if found is None else found.shell_complete(ctx, param, incomplete)

    def types_here(self, context: click.Context) -> tuple[StoredName | None, ...]:
        """The types, when they depend on options."""
        return self._types


def _given(context: click.Context, parameter: click.Parameter) -> tuple[str, ...]:
    """The words of this parameter before the one that is completed."""
    return context.params.get(parameter.name or "") or ()


def _dots(store: "Store", _: str | None) -> Iterator[str]:
    from dmsync.engine.dot_lookup import display_name

    for row in store.catalog.dots():
        yield display_name(store, row.namespace, row.name)


def _remotes(store: "Store", _: str | None) -> Iterator[str]:
    return (remote.name for remote in store.catalog.remotes())


def _refs(*spaces: str) -> Names:
    """Short names of the current dot's refs in these spaces; a stash keeps its `stash/`."""

    def names(store: "Store", dot: str | None) -> Iterator[str]:
        from dmsync.engine.dot_lookup import resolve_dot

        row = resolve_dot(store, dot)
        for space in spaces:
            for ref in store.catalog.refs(row.dot, f"{space}/"):
                yield ref.name if space == "stash" else ref.short_name

    return names


_revisions = _refs("branch", "tag", "remote", "stash")


def _dots_and_remotes(store: "Store", dot: str | None) -> Iterator[str]:
    yield from _dots(store, dot)
    yield from _remotes(store, dot)


def _revisions_or_head(store: "Store", dot: str | None) -> Iterator[str]:
    found = list(_revisions(store, dot))
    return iter(["HEAD", *found] if found else [])


DOT = StoredName(_dots)
REMOTE = StoredName(_remotes)
DOT_OR_REMOTE = StoredName(_dots_and_remotes)
BRANCH = StoredName(_refs("branch"))
TAG = StoredName(_refs("tag"))
STASH = StoredName(_refs("stash"))
REVISION = StoredName(_revisions)
RANGE = _Range(_revisions)
PLACE = _Place(_revisions_or_head)
FIRST_REVISION = _FirstRevision(_revisions_or_head)
NEW_NAME_AND_REVISION = Words(None, REVISION)
