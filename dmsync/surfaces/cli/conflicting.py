"""How commands that merge on the way tell of conflicts, and of what is left to do after them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from dmsync.errors import MergeConflict
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.invocation import Invocation
from dmsync.surfaces.cli.merge import conflict_text

if TYPE_CHECKING:
    from dmsync.engine.merging.state import ConflictInfo

CONFLICTS: Final = MergeConflict.exit_code


def tell_conflicts(invocation: Invocation, conflicts: "Sequence[ConflictInfo]", after: str) -> None:
    """The conflicts of a merge that is under way now; `after` says what its end leaves to do."""
    for conflict in conflicts:
        invocation.result(f"C {conflict_text(conflict)}")
    count = output.counted(len(conflicts), "conflict")
    if invocation.dry_run:
        invocation.talk(f"{count}; nothing was changed (dry run)")
    else:
        invocation.talk(
            f"{count}: nothing was committed. dm resolve PATH --ours|--theirs|--base|--as-is, "
            f"then dm merge --continue; or dm merge --abort{after}"
        )
