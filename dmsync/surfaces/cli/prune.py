"""`dm prune`: thin out old commits by rules."""

from typing import TYPE_CHECKING

import click

from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.completions import DOT, REMOTE
from dmsync.surfaces.cli.invocation import DmCommand, Invocation, changing_options

if TYPE_CHECKING:
    from dmsync.engine.prune import PruneSummary

_COUNT = click.IntRange(0, 1_000_000)


@click.command(
    "prune",
    cls=DmCommand,
    epilog="Example: dm prune --keep-last 10 --keep-daily 14 --keep-monthly 12 --dry-run",
)
@click.argument("dot", required=False, type=DOT)
@click.option("--keep-last", type=_COUNT, default=0, metavar="N", help="The newest N.")
@click.option("--keep-hourly", type=_COUNT, default=0, metavar="N", help="One an hour, N hours.")
@click.option("--keep-daily", type=_COUNT, default=0, metavar="N", help="One a day, N days.")
@click.option("--keep-weekly", type=_COUNT, default=0, metavar="N", help="One a week, N weeks.")
@click.option("--keep-monthly", type=_COUNT, default=0, metavar="N", help="One a month.")
@click.option("--keep-yearly", type=_COUNT, default=0, metavar="N", help="One a year.")
@click.option("--keep-within", metavar="DURATION", help="All of the last 36h, 14d, 2w, 6m or 1y.")
@click.option(
    "--keep-tag",
    "tag_patterns",
    multiple=True,
    metavar="PATTERN",
    help="Of tagged commits only those; default: all. Repeatable.",
)
@click.option(
    "--keep-not-pushed",
    "not_pushed",
    multiple=True,
    type=REMOTE,
    metavar="REMOTE",
    help="What REMOTE does not have. Repeatable.",
)
@changing_options
@click.pass_obj
def prune_command(
    invocation: Invocation,
    dot: str | None,
    keep_last: int,
    keep_hourly: int,
    keep_daily: int,
    keep_weekly: int,
    keep_monthly: int,
    keep_yearly: int,
    keep_within: str | None,
    tag_patterns: tuple[str, ...],
    not_pushed: tuple[str, ...],
) -> None:
    """Keep the commits of each branch that any rule names, and thin out the others.

    A thinned commit stays in the log with its id, message and parents; its content can no longer
    be checked out here (a remote that has it can give it back: dm fetch --unshallow), and dm gc
    frees its space when the grace is over. Time is when this store learnt of a commit (all that
    came with one push or clone came at one time), never what a commit says; an hour, day or week
    keeps its newest one (UTC). Always kept: tips of branches, stashes, where branches meet, and
    what the next push or pull builds on. A tag that --keep-tag leaves out stays, but is not pushed.
    Undo cannot bring back what was thinned.
    --dry-run shows each commit with its reasons.
    """
    from dmsync.core.durations import parse_duration
    from dmsync.core.retention import RetentionPolicy
    from dmsync.engine.prune import PruneRequest, prune

    policy = RetentionPolicy(
        last=keep_last,
        hourly=keep_hourly,
        daily=keep_daily,
        weekly=keep_weekly,
        monthly=keep_monthly,
        yearly=keep_yearly,
        within_ns=0 if keep_within is None else parse_duration(keep_within),
    )
    request = PruneRequest(policy, tag_patterns or None, not_pushed, invocation.dry_run)
    with invocation.open_store() as store:
        row = invocation.resolve_dot(store, dot)
        with invocation.progress(f"pruning {row.name}") as progress:
            summary = prune(store, row, request, progress)
    _print(invocation, summary)


def _print(invocation: Invocation, summary: "PruneSummary") -> None:
    thinned = len(summary.thinned)
    kept = len(summary.commits) - thinned
    if invocation.as_json:
        invocation.summary(
            {
                "kept": kept,
                "thinned": thinned,
                "dry_run": invocation.dry_run,
                "commits": [
                    {
                        "id": commit.id.hex(),
                        "learnt": output.iso_date(commit.learnt_ns),
                        "kept": bool(commit.reasons),
                        "reasons": list(commit.reasons),
                    }
                    for commit in summary.commits
                ],
            }
        )
        return
    if invocation.dry_run or invocation.verbose:
        rows = [
            (
                "keep" if commit.reasons else "thin",
                commit.id.hex()[: output.SHORT_ID_DIGITS],
                output.human_date(commit.learnt_ns, 0),
                ", ".join(commit.reasons),
            )
            for commit in summary.commits
        ]
        for line in output.table(rows):
            invocation.result(line)
    verb = "would be thinned" if invocation.dry_run else "thinned"
    invocation.talk(f"{output.counted(kept, 'commit')} kept, {thinned} {verb}")
