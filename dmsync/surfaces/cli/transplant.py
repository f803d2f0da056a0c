"""`dm cherry-pick` and `dm revert`: what one commit changed, done again or taken back."""

from typing import TYPE_CHECKING

import click

from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.changes import change_fields, change_line
from dmsync.surfaces.cli.completions import REVISION
from dmsync.surfaces.cli.conflicting import CONFLICTS, tell_conflicts
from dmsync.surfaces.cli.invocation import DmCommand, Invocation, changing_options
from dmsync.surfaces.cli.merge import conflict_fields
from dmsync.surfaces.cli.switching import WITH_WARNINGS, in_use_option, warn_not_applied

if TYPE_CHECKING:
    from dmsync.engine.transplant import Transplanted, TransplantSummary

_MAINLINE = click.option(
    "-m", "--mainline", type=int, metavar="N", help="Of a merge: against its Nth parent."
)
_NO_COMMIT = click.option("--no-commit", is_flag=True, help="Leave the result uncommitted.")
_ALLOW_EMPTY = click.option(
    "--allow-empty", is_flag=True, help="Commit also when nothing is left to change."
)


@click.command("cherry-pick", cls=DmCommand, epilog="Example: dm cherry-pick -x hotfix~1 hotfix")
@click.argument("revisions", metavar="REV...", nargs=-1, required=True, type=REVISION)
@_MAINLINE
@_NO_COMMIT
@click.option("-x", "mark_origin", is_flag=True, help="Name the picked commit in the message.")
@_ALLOW_EMPTY
@in_use_option
@changing_options
@click.pass_obj
def cherry_pick_command(
    invocation: Invocation,
    revisions: tuple[str, ...],
    mainline: int | None,
    no_commit: bool,
    mark_origin: bool,
    allow_empty: bool,
    in_use: bool,
) -> int:
    """Apply what each REV changed as a new commit, with its author, message and metadata.

    A range A..B stands for its commits, oldest first; merges among them need -m.

    Stops at the first conflict (exit code 15): resolve it, dm merge --continue, then pick the
    rest. A dry run looks at each REV by itself.
    """
    from dmsync.engine.transplant import TransplantRequest, cherry_pick

    request = TransplantRequest(
        revisions, mainline, no_commit, mark_origin, allow_empty, in_use, invocation.dry_run
    )
    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        with invocation.progress(f"picking into {dot.name}") as progress:
            summary = cherry_pick(store, dot, request, progress)
    return _print(invocation, summary, "cherry-pick")


@click.command("revert", cls=DmCommand, epilog="Example: dm revert HEAD~2")
@click.argument("revisions", metavar="REV...", nargs=-1, required=True, type=REVISION)
@_MAINLINE
@_NO_COMMIT
@_ALLOW_EMPTY
@in_use_option
@changing_options
@click.pass_obj
def revert_command(
    invocation: Invocation,
    revisions: tuple[str, ...],
    mainline: int | None,
    no_commit: bool,
    allow_empty: bool,
    in_use: bool,
) -> int:
    """Take back what each REV changed, in new commits: history stays, unlike with dm reset.

    A range A..B stands for its commits, newest first; merges among them need -m.

    Stops at the first conflict (exit code 15): resolve it, dm merge --continue, then revert the
    rest. A dry run looks at each REV by itself.
    """
    from dmsync.engine.transplant import TransplantRequest, revert

    request = TransplantRequest(
        revisions, mainline, no_commit, False, allow_empty, in_use, invocation.dry_run
    )
    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        with invocation.progress(f"reverting in {dot.name}") as progress:
            summary = revert(store, dot, request, progress)
    return _print(invocation, summary, "revert")


def _print(invocation: Invocation, summary: "TransplantSummary", command: str) -> int:
    code = _exit_code(summary)
    if invocation.as_json:
        invocation.summary(
            {
                "branch": summary.branch,
                "dry_run": invocation.dry_run,
                "commits": [_fields(done) for done in summary.done],
                "conflicts": [conflict_fields(conflict) for conflict in summary.conflicts],
                "left": [commit.hex() for commit in summary.left],
                "exit_code": code,
            }
        )
        return code
    for done in summary.done:
        _tell(invocation, done)
    if summary.conflicts:
        rest = " ".join(commit.hex()[: output.SHORT_ID_DIGITS] for commit in summary.left)
        after = f"; then dm {command} {rest}" if rest else ""
        tell_conflicts(invocation, summary.conflicts, None, after)
    return code


def _exit_code(summary: "TransplantSummary") -> int:
    if summary.conflicts:
        return CONFLICTS
    is_partial = any(done.withheld or done.unapplied for done in summary.done)
    return WITH_WARNINGS if is_partial else 0


def _tell(invocation: Invocation, done: "Transplanted") -> None:
    source = done.source.hex()[: output.SHORT_ID_DIGITS]
    if done.outcome == "nothing":
        invocation.talk(f"{source}: nothing left to change; no commit was made (--allow-empty)")
    elif done.commit is not None:
        invocation.result(done.commit.hex())
    else:
        for change in done.changes:
            invocation.result(change_line(change))
    warn_not_applied(invocation, done.withheld, done.unapplied)


def _fields(done: "Transplanted") -> dict[str, object]:
    return {
        "source": done.source.hex(),
        "outcome": done.outcome,
        "commit": done.commit.hex() if done.commit else None,
        "changes": [change_fields(change) for change in done.changes],
        "withheld": [output.path_fields(path) for path in done.withheld],
        "unapplied": [output.path_fields(path) for path in done.unapplied],
    }
