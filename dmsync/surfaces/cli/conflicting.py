"""How commands that merge tell of conflicts, and of what is left to do after them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from dmsync.errors import MergeConflict
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.invocation import Invocation

if TYPE_CHECKING:
    from dmsync.engine.merging.state import ConflictInfo

CONFLICTS: Final = MergeConflict.exit_code


def tell_conflicts(
    invocation: Invocation,
    conflicts: "Sequence[ConflictInfo]",
    theirs: bytes | None,
    after: str = "",
) -> None:
    """The conflicts of a merge that is under way now. `theirs` is the commit that came in, where
    there is one to be named; `after` says what the merge's end leaves to do."""
    for conflict in conflicts:
        invocation.result(f"C {conflict_text(conflict, theirs)}")
    count = output.counted(len(conflicts), "conflict")
    if invocation.dry_run:
        invocation.talk(f"{count}; nothing was changed (dry run)")
    else:
        invocation.talk(
            f"{count}: nothing was committed. dm resolve PATH --ours|--theirs|--base|--as-is, "
            f"then dm merge --continue; or dm merge --abort{after}"
        )


def conflict_text(conflict: "ConflictInfo", theirs: bytes | None = None) -> str:
    """`PATH: reason; exists in ours, theirs` on one line; `theirs` is the commit that came in."""
    sides = ", ".join(conflict.sides) or "neither side"
    text = f"{output.escape_name(conflict.path)}: {output.escape_name(conflict.reason)}"
    text += f"; exists in {sides}"
    if conflict.also:
        names = ", ".join(output.escape_name(path) for path in conflict.also)
        text += f"; also named {names}"
    if not conflict.copies and theirs is not None and "theirs" in conflict.sides:
        path = "" if conflict.path == b"." else output.escape_name(conflict.path)
        text += f"; dm export {theirs.hex()[: output.SHORT_ID_DIGITS]}:{path} DIR writes theirs out"
    return text
