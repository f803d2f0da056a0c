"""What commands that write into working trees share: their options, and telling what they did."""

from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol, TypeVar

import click

from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.invocation import Invocation

Command = TypeVar("Command", bound=Callable[..., Any])

WITH_WARNINGS: Final = 3
"""Exit code: done, but not everything recorded could be applied here."""

_DISCARD = click.option(
    "--discard", is_flag=True, help="Do not store the uncommitted changes that go."
)
_IN_USE = click.option("--in-use", is_flag=True, help="Also while processes write in the tree.")
_TREE_OPTIONS = (
    click.option(
        "--accept-moved-tree", is_flag=True, help="DIR may be another directory, or gone."
    ),
    click.option(
        "--trusted", is_flag=True, help="Apply devices, setuid bits and capabilities too."
    ),
    _IN_USE,
)


class TreeResult(Protocol):
    """The part of a summary that tells what happened in a working tree."""

    @property
    def stash(self) -> str | None: ...
    @property
    def files_written(self) -> int: ...
    @property
    def files_removed(self) -> int: ...
    @property
    def bytes_written(self) -> int: ...
    @property
    def withheld(self) -> tuple[bytes, ...]: ...
    @property
    def unapplied(self) -> tuple[bytes, ...]: ...


def tree_options(command: Command) -> Command:
    """--accept-moved-tree --trusted --in-use, as parameters of those names."""
    for option in reversed(_TREE_OPTIONS):
        command = option(command)
    return command


def in_use_option(command: Command) -> Command:
    """--in-use alone."""
    return _IN_USE(command)


def switching_options(command: Command) -> Command:
    """Those of `tree_options`, and --discard: for commands that store first what goes."""
    return _DISCARD(tree_options(command))


def tell_stash(invocation: Invocation, stash: str | None) -> None:
    """Where uncommitted changes are kept, if there were any."""
    if stash is not None:
        invocation.talk(f"the uncommitted changes are kept as {stash} (dm stash apply {stash})")


def tree_exit_code(result: TreeResult) -> int:
    """0, or WITH_WARNINGS when something recorded was not applied."""
    return WITH_WARNINGS if result.withheld or result.unapplied else 0


def tell_tree(invocation: Invocation, result: TreeResult) -> None:
    """What a switch did to the tree, for a human."""
    warn_not_applied(invocation, result.withheld, result.unapplied)
    tell_stash(invocation, result.stash)
    if invocation.verbose:
        invocation.talk(
            f"{result.files_written} files written, {result.files_removed} removed, "
            f"{output.human_size(result.bytes_written)}"
        )


def warn_not_applied(
    invocation: Invocation, withheld: Sequence[bytes], unapplied: Sequence[bytes]
) -> None:
    """What was recorded and is not so on this disk: devices not made, metadata not set."""
    for what, paths in (
        ("devices were not made", withheld),
        ("paths have not all of their owner, mode and attributes", unapplied),
    ):
        if paths:
            first = output.escape_name(paths[0])
            invocation.warn(
                f"{len(paths)} {what} ({first}{', ...' if len(paths) > 1 else ''}); "
                "they stay recorded, and --trusted applies what this user may"
            )


def tree_fields(result: TreeResult) -> dict[str, object]:
    """JSON of what a switch did to the tree."""
    return {
        "stash": result.stash,
        "files_written": result.files_written,
        "files_removed": result.files_removed,
        "bytes_written": result.bytes_written,
        "withheld": [output.path_fields(path) for path in result.withheld],
        "unapplied": [output.path_fields(path) for path in result.unapplied],
    }
