"""`dm push`, `dm pull`, `dm fetch`, `dm clone`: commits to and from other clusters."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from dataclasses import fields as dataclass_fields
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, TypedDict

import click

from dmsync.errors import Diverged, DmError, UsageError
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.completions import BRANCH, DOT, REMOTE, REVISION
from dmsync.surfaces.cli.invocation import (
    FILE_NAME,
    DmCommand,
    Invocation,
    changing_options,
    transfer_options,
)

if TYPE_CHECKING:
    from dmsync.core.ids import DotId, ObjectId
    from dmsync.engine.store import Store
    from dmsync.engine.sync_pull import FetchSummary, PullMode
    from dmsync.engine.sync_push import PushSummary
    from dmsync.storage.catalog import DotRow
    from dmsync.surfaces.cli.connection import Remote
    from dmsync.wire.messages import RefStatus

_DEPTH_HELP: Final = "Content of the N newest commits of each branch; records of all."
_TAGS_SHOWN_MAX: Final = 20
_MILDEST_FIRST: Final = (0, 4, 3, 75, 13, 14, 15, 18, 10, 2, 12, 17, 1, 16)
"""Exit codes from harmless to alarming: with --all the worst of all dots is the command's."""


def worst(codes: Sequence[int]) -> int:
    """The exit code that most needs to be seen."""
    order = {code: rank for rank, code in enumerate(_MILDEST_FIRST)}
    return max(codes, key=lambda code: order.get(code, len(order)), default=0)


class _PushCommand(DmCommand):
    """--force-with-lease takes its value after `=` only, so that a remote's name may follow it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = ["--force-with-lease=" if arg == "--force-with-lease" else arg for arg in args]
        return super().parse_args(ctx, given)


@click.command("push", cls=_PushCommand, epilog="Example: dm push backup app --all -q")
@click.argument("remote", required=False, type=REMOTE)
@click.argument("dot", required=False, type=DOT)
@click.argument("branch", required=False, type=BRANCH)
@click.option("--all", "every", is_flag=True, help="Every branch; without DOT of every dot.")
@click.option("--tags", is_flag=True, help="The tags of the dot too.")
@click.option("--remote-name", metavar="[NS/]NAME", help="The dot's name over there.")
@click.option(
    "--force-with-lease",
    "lease",
    type=REVISION,
    metavar="[=REV]",
    help="Overwrite, if the remote branch is still at REV (default: where it was last seen).",
)
@click.option("--stash-on-divergence", "stash", is_flag=True, help="Keep theirs as X-DIVERGED-...")
@click.option("--atomic", is_flag=True, help="Move all refs or none.")
@transfer_options
@changing_options
@click.pass_obj
def push_command(
    invocation: Invocation,
    remote: str | None,
    dot: str | None,
    branch: str | None,
    every: bool,
    tags: bool,
    remote_name: str | None,
    lease: str | None,
    stash: bool,
    atomic: bool,
) -> int:
    """Send a branch (default: the current one) with all commits it needs to REMOTE.

    REMOTE is a remote's name or a URL. A push that was cut goes on where it stopped when it is
    run again. Refuses (exit code 14) when the remote branch has commits this one lacks.
    """
    if lease is not None and stash:
        raise UsageError("--force-with-lease or --stash-on-divergence, not both")
    if every and branch is not None:
        raise UsageError("--all is every branch: give no BRANCH")
    if every and dot is None and remote_name is not None:
        raise UsageError("--remote-name names one dot: give DOT")
    name = _required(remote, "push to")

    def push_one(store: "Store", row: "DotRow", there: "Remote") -> dict[str, object]:
        from dmsync.engine.history import resolve_revision
        from dmsync.engine.sync_push import PushRequest
        from dmsync.surfaces.cli.connection import push

        remote_dot = _remote_dot(store, row, there, remote_name)
        request = PushRequest(
            remote=there.name,
            dot=row.dot,
            branches=None if every else (branch or store.catalog.head(row.dot),),
            remote_namespace=remote_dot[0],
            remote_name=remote_dot[1],
            tags=tags,
            mode="stash" if stash else "ff" if lease is None else "lease",
            expected=resolve_revision(store, row, lease) if lease else None,
            atomic=atomic,
            dry_run=invocation.dry_run,
            accept_rewind=invocation.accept_rewind,
            actor=invocation.settings.actor,
        )
        title = f"Pushing {_written(row)} to {there.name}:{_remote_text(row, remote_dot)}"
        summary = _announced(
            invocation, title, lambda: push(invocation, store, there, request), _push_outcome
        )
        _tell_standing(invocation, there.name, summary)
        if summary.tags_left_out:
            names = ", ".join(summary.tags_left_out[:_TAGS_SHOWN_MAX])
            invocation.warn(
                f"{output.counted(len(summary.tags_left_out), 'tag')} left out, since {there.name} "
                f"runs a dm that is too old for them, or their content is not here: {names}"
            )
        if summary.remote_is_hollow:
            invocation.talk(
                f"{there.name} has some commits by their record alone; dm fetch --unshallow there "
                "brings their content, from a store that has it"
            )
        return _push_fields(invocation, summary)

    return _for_dots(invocation, name, dot, every and dot is None, push_one)


def _required(remote: str | None, what: str) -> str:
    if remote is None:
        raise UsageError(
            f"Please specify which remote you want to {what}. Use 'dm remote -v' to list remotes."
        )
    return remote


def _written(row: "DotRow") -> str:
    from dmsync.core.names import full_name

    return full_name(row.namespace, row.name)


def _remote_dot(
    store: "Store", row: "DotRow", there: "Remote", given: str | None
) -> tuple[str | None, str | None]:
    """(namespace, name) over there: as given, else the upstream, else for the server to find."""
    if given is not None:
        return _plain_name(given)
    upstream = store.catalog.upstream(row.dot, there.name)
    if upstream is None:
        return None, None
    return upstream[0] or None, upstream[1]


def _plain_name(text: str) -> tuple[str | None, str]:
    """`[namespace/]dot`. Raises InvalidName, UsageError."""
    from dmsync.core.names import parse_dot_name

    parsed = parse_dot_name(text)
    if parsed.branch is not None or parsed.subdot is not None:
        raise UsageError(f"not a dot's name alone: {text}")
    return parsed.namespace, parsed.dot


def _remote_text(row: "DotRow", remote_dot: tuple[str | None, str | None]) -> str:
    namespace, name = remote_dot
    return f"{namespace}/{name}" if namespace else name or row.name


def _announced(
    invocation: Invocation,
    title: str,
    work: Callable[[], Any],
    outcome: Callable[[Any, bool], Iterable[str]],
) -> Any:
    """Say what begins and what became of it: `Done!`, as Dotmesh does, when all of it was done.

    `outcome(summary, dry run)` are the closing lines.
    """
    if not invocation.as_json:
        invocation.result(title)
    done = work()
    if not invocation.as_json:
        for line in outcome(done, invocation.dry_run):
            invocation.result(line)
    return done


def _push_outcome(summary: "PushSummary", dry_run: bool) -> Iterable[str]:
    from dmsync.wire.messages import RefStatus

    if summary.nothing_to_do:
        yield "Already up to date."
        return
    refused = [ref.ref for ref in summary.refs if ref.status is RefStatus.REFUSED]
    if summary.commits_hollow and not dry_run:
        yield f"  {output.counted(summary.commits_hollow, 'commit')} arrived by their record alone"
    if dry_run:
        size = output.human_size(summary.bytes_planned)
        yield (
            f"would send {output.counted(summary.commits_sent, 'commit')}, "
            f"{output.counted(summary.objects_sent, 'object')}, "
            f"about {size if summary.bytes_planned else '0 B'} before compression"
        )
        for ref in summary.refs:
            yield f"  {_ref_line(ref.ref, ref.old, ref.new, ref.status.name.lower())}"
    elif refused:
        moved = sum(ref.status in _moving() for ref in summary.refs)
        yield f"{output.counted(moved, 'ref')} pushed, {len(refused)} refused."
    else:
        yield "Done!"


def _moving() -> "frozenset[RefStatus]":
    from dmsync.engine.sync_refs import MOVING

    return MOVING


def _pull_outcome(summary: "FetchSummary", dry_run: bool) -> Iterable[str]:
    if dry_run:
        for branch, tip in summary.remote_tips:
            yield f"  {branch} is at {tip.hex()[: output.SHORT_ID_DIGITS]} there"
        yield "Nothing was fetched (dry run)."
    else:
        yield from _content_lines(summary)
        yield "Already up to date." if summary.nothing_to_do else "Done!"


def _content_lines(summary: "FetchSummary") -> Iterable[str]:
    """What came without content, and what has it now."""
    if summary.commits_hollow:
        yield f"  {output.counted(summary.commits_hollow, 'commit')} came by their record alone"
    if summary.commits_deepened:
        yield f"  {output.counted(summary.commits_deepened, 'commit')} have their content now"
    if summary.commits_unavailable:
        count = output.counted(summary.commits_unavailable, "commit")
        yield f"  the content of {count} is not there either"


def _fetch_outcome(summary: "FetchSummary", dry_run: bool) -> Iterable[str]:
    """What a fetch moves are tracking refs."""
    for name, old, new in summary.tracking:
        yield f"  {_ref_line(name, old, new, 'fetched')}"
    if summary.tracking and not dry_run:
        yield from _content_lines(summary)
        yield "Done!"
    else:
        yield from _pull_outcome(summary, dry_run)


def _ref_line(ref: str, old: "ObjectId | None", new: "ObjectId | None", what: str) -> str:
    """`master 0123456789ab -> ba9876543210 (fast-forward)`."""
    name = ref.removeprefix("branch/").removeprefix("remote/")
    before, after = (oid.hex()[: output.SHORT_ID_DIGITS] if oid else "(none)" for oid in (old, new))
    change = before if before == after else f"{before} -> {after}"
    return f"{output.escape_name(name)} {change} ({what.replace('_', '-')})"


def _for_dots(
    invocation: Invocation,
    remote: str,
    dot: str | None,
    every_dot: bool,
    work: Callable[["Store", "DotRow", "Remote"], dict[str, object]],
) -> int:
    """Run `work` for one dot or for every dot; with every dot a failure does not stop the rest."""
    from dmsync.surfaces.cli.connection import find_remote

    with invocation.open_store() as store:
        there = find_remote(invocation, store, remote)
        if not every_dot:
            row = invocation.resolve_dot(store, dot)
            fields = work(store, row, there)
            if invocation.as_json:
                invocation.summary({"remote": there.name, "dot": _written(row), **fields})
            return _code_of(fields)
        codes = [0]
        for row in store.catalog.dots():
            codes.append(_one_of_many(invocation, store, row, there, work))
    if invocation.as_json:
        failed = sum(code not in (0, 3) for code in codes)
        invocation.summary({"remote": there.name, "dots": len(codes) - 1, "failed": failed})
    return worst(codes)


def _one_of_many(
    invocation: Invocation,
    store: "Store",
    row: "DotRow",
    there: "Remote",
    work: Callable[["Store", "DotRow", "Remote"], dict[str, object]],
) -> int:
    from dmsync.surfaces.cli.main import print_error

    try:
        fields = work(store, row, there)
    except DmError as error:
        print_error(error, as_json=invocation.as_json, subject=_written(row))
        return error.exit_code
    if invocation.as_json:
        output.write_json_line({"type": "dot", "dot": _written(row), **fields})
    return _code_of(fields)


def _code_of(fields: dict[str, object]) -> int:
    code = fields.get("exit_code", 0)
    assert isinstance(code, int)
    return code


def _push_fields(invocation: Invocation, summary: "PushSummary") -> dict[str, object]:
    """JSON of a push; refs that were refused while others went through set the exit code."""
    from dmsync.surfaces.cli.main import print_error

    fields = _plain_fields(summary, ("refs",))
    fields["refs"] = [
        {
            "ref": ref.ref,
            "status": ref.status.name.lower(),
            "old": ref.old.hex() if ref.old else None,
            "new": ref.new.hex() if ref.new else None,
            "stash": ref.stash,
            "error": None if ref.error is None else ref.error.message,
        }
        for ref in summary.refs
    ]
    errors = [ref.error for ref in summary.refs if ref.error is not None]
    for error in errors:
        print_error(error, as_json=invocation.as_json)
    fields["exit_code"] = worst([error.exit_code for error in errors] or [0])
    return fields


def _plain_fields(summary: Any, left_out: Sequence[str]) -> dict[str, object]:
    """A summary's own fields, ids in hex."""
    found: dict[str, object] = {}
    for item in dataclass_fields(summary):
        value = getattr(summary, item.name)
        if item.name not in left_out:
            found[item.name] = value.hex() if isinstance(value, bytes) else value
    return found


# --- pull, fetch, clone ------------------------------------------------------------------------


@dataclass(frozen=True)
class _Content:
    """Of which commits the content is asked for, as the options of fetch and pull say it."""

    depth: int | None = None
    deepen: int | None = None
    unshallow: bool = False

    def wishes(self) -> "_Wishes":
        """Fields of a FetchRequest. Raises UsageError."""
        if sum((self.depth is not None, self.deepen is not None, self.unshallow)) > 1:
            raise UsageError("one of --depth, --deepen and --unshallow")
        return {
            "depth": self.depth or 0,
            "deepen": self.deepen or 0,
            "unshallow": self.unshallow,
        }


class _Wishes(TypedDict):
    depth: int
    deepen: int
    unshallow: bool


def _content_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """--depth, --deepen, --unshallow, as one argument `content`."""

    @click.option("--depth", type=click.IntRange(1), metavar="N", help=_DEPTH_HELP)
    @click.option(
        "--deepen", type=click.IntRange(1), metavar="N", help="Content of N more older commits."
    )
    @click.option("--unshallow", is_flag=True, help="Content of all commits that REMOTE has.")
    @wraps(command)
    def with_content(
        *args: Any, depth: int | None, deepen: int | None, unshallow: bool, **others: Any
    ) -> Any:
        return command(*args, content=_Content(depth, deepen, unshallow), **others)

    return with_content


@click.command("pull", cls=DmCommand, epilog="Example: dm pull backup app master")
@click.argument("remote", required=False, type=REMOTE)
@click.argument("dot", required=False, type=DOT)
@click.argument("branch", required=False, type=BRANCH)
@click.option("--all", "every", is_flag=True, help="Every branch; without DOT of every dot.")
@click.option("--remote-name", metavar="[NS/]NAME", help="The dot's name over there.")
@click.option("--stash-on-divergence", "stash", is_flag=True, help="Keep ours as X-DIVERGED-...")
@click.option("--force", is_flag=True, help="Take theirs; our commits stay in the reflog.")
@click.option("--merge", is_flag=True, help="When both sides have commits, merge theirs into ours.")
@_content_options
@transfer_options
@changing_options
@click.pass_obj
def pull_command(
    invocation: Invocation,
    remote: str | None,
    dot: str | None,
    branch: str | None,
    every: bool,
    remote_name: str | None,
    stash: bool,
    force: bool,
    merge: bool,
    content: _Content,
) -> int:
    """Fetch a branch (default: the current one) from REMOTE and fast-forward it, tree included.

    Refuses when both sides have commits the other lacks (exit code 14; --merge merges them, see
    dm merge) or uncommitted changes are in the way (18); what was fetched stays.
    """
    if stash + force + merge > 1:
        raise UsageError("one of --merge, --force and --stash-on-divergence")
    if merge and every:
        raise UsageError("--merge is for the current branch: without --all")
    if every and branch is not None:
        raise UsageError("--all is every branch: give no BRANCH")
    move: PullMode = "stash" if stash else "force" if force else "ff"
    return _fetch_dots(
        invocation,
        _required(remote, "pull from"),
        dot,
        every_dot=every and dot is None,
        branch=branch,
        every_branch=every,
        remote_name=remote_name,
        move=move,
        content=content,
        merge=merge,
    )


@click.command("fetch", cls=DmCommand, epilog="Example: dm fetch backup && dm log backup/master")
@click.argument("remote", required=False, type=REMOTE)
@click.argument("dot", required=False, type=DOT)
@click.option("--all", "every", is_flag=True, help="Every dot, when DOT is not given.")
@click.option("--remote-name", metavar="[NS/]NAME", help="The dot's name over there.")
@_content_options
@transfer_options
@changing_options
@click.pass_obj
def fetch_command(
    invocation: Invocation,
    remote: str | None,
    dot: str | None,
    every: bool,
    remote_name: str | None,
    content: _Content,
) -> int:
    """Fetch all branches of a dot as REMOTE/BRANCH; local branches and trees stay as they are.

    Of a shallow clone, --deepen and --unshallow bring the content of older commits.
    """
    return _fetch_dots(
        invocation,
        _required(remote, "fetch from"),
        dot,
        every_dot=every and dot is None,
        branch=None,
        every_branch=True,
        remote_name=remote_name,
        move="none",
        content=content,
    )


def _fetch_dots(
    invocation: Invocation,
    remote: str,
    dot: str | None,
    *,
    every_dot: bool,
    branch: str | None,
    every_branch: bool,
    remote_name: str | None,
    move: "PullMode",
    content: _Content,
    merge: bool = False,
) -> int:
    if every_dot and remote_name is not None:
        raise UsageError("--remote-name names one dot: give DOT")
    wishes = content.wishes()
    verb = "Fetching" if move == "none" else "Pulling"

    def fetch_one(store: "Store", row: "DotRow", there: "Remote") -> dict[str, object]:
        from dmsync.engine.sync_pull import FetchRequest
        from dmsync.surfaces.cli.connection import fetch

        remote_dot = _remote_dot(store, row, there, remote_name)
        request = FetchRequest(
            remote=there.name,
            dot=row.dot,
            remote_namespace=remote_dot[0],
            remote_name=remote_dot[1],
            branches=None if every_branch else (branch or store.catalog.head(row.dot),),
            move=move,
            dry_run=invocation.dry_run,
            accept_rewind=invocation.accept_rewind,
            command="fetch" if move == "none" else "pull",
            actor=invocation.settings.actor,
            **wishes,
        )
        title = f"{verb} {_written(row)} from {there.name}:{_remote_text(row, remote_dot)}"
        if move != "none" and not every_branch:
            _refuse_merging(store, row, branch, merge=merge)
        try:
            summary = _announced(
                invocation,
                title,
                lambda: fetch(invocation, store, there, request),
                _fetch_outcome if move == "none" else _pull_outcome,
            )
        except Diverged:
            if not merge:
                raise
            return _merge_fetched(invocation, store, row, there.name)
        _tell_kept_tags(invocation, there.name, summary)
        _tell_standing(invocation, there.name, summary)
        return fetch_fields(summary)

    return _for_dots(invocation, remote, dot, every_dot, fetch_one)


def _refuse_merging(store: "Store", row: "DotRow", branch: str | None, *, merge: bool) -> None:
    """Refuse a pull into a branch that is being merged into, before anything is transferred."""
    from dmsync.engine.merging.state import refuse_merging

    head = store.catalog.head(row.dot)
    if merge and branch not in (None, head):
        raise UsageError(
            f"--merge merges into the current branch, which is {head}", hint=f"dm checkout {branch}"
        )
    refuse_merging(store, row.dot, branch or head)


def _merge_fetched(
    invocation: Invocation, store: "Store", row: "DotRow", remote: str
) -> dict[str, object]:
    """Merge what was fetched into the current branch; JSON of the merge."""
    from dmsync.engine.merging.lifecycle import MergeOptions, merge_revision
    from dmsync.surfaces.cli.merge import merge_exit_code, merge_fields, tell_merge

    branch = store.catalog.head(row.dot)
    options = MergeOptions(
        f"remote/{remote}/{branch}", message=f"merge {remote}/{branch} into {branch}"
    )
    with invocation.progress(f"merging into {row.name}") as progress:
        summary = merge_revision(store, row, options, progress)
    if not invocation.as_json:
        tell_merge(invocation, summary)
    return {
        **merge_fields(summary, dry_run=False),
        "exit_code": merge_exit_code(summary),
    }


@click.command("clone", cls=DmCommand, epilog="Example: dm clone dm@vault:2222 app --local-name a")
@click.argument("remote", required=False, type=REMOTE)
@click.argument("dot", metavar="[NS/]DOT", required=False)
@click.argument("branch", required=False)
@click.option("--local-name", metavar="[NS/]NAME", help="What to call it here.")
@click.option("--depth", type=click.IntRange(1), metavar="N", help=_DEPTH_HELP)
@click.option(
    "--subdot",
    "subdots",
    metavar="NAME",
    multiple=True,
    help="Keep the content of this subdot only; may be given again.",
)
@click.option("--stash-on-divergence", "stash", is_flag=True, help="When it is here already.")
@click.option(
    "--at",
    "at",
    type=FILE_NAME,
    metavar="DIR",
    help="Write the files to DIR (new or empty): it is the dot's subdot __default__.",
)
@click.option("--as-root", is_flag=True, help="DIR is the whole tree: its directories are subdots.")
@transfer_options
@changing_options
@click.pass_obj
def clone_command(
    invocation: Invocation,
    remote: str | None,
    dot: str | None,
    branch: str | None,
    local_name: str | None,
    depth: int | None,
    subdots: tuple[str, ...],
    stash: bool,
    at: str | None,
    as_root: bool,
) -> int:
    """Copy a dot from REMOTE: all branches, or BRANCH and what it stems from.

    Its files live in the store (dm dot path prints where), or with --at in DIR.

    With --depth the clone is shallow: it has the record of every commit (id, parents, message), so
    log and merge work as ever, and the content of the newest ones; reading an older one says so,
    and dm fetch --deepen brings more. It commits, pulls and pushes as any other: a remote
    that lacks the older commits gets them by their record alone, one that has them keeps them.

    With --subdot it is partial: the working tree has these subdots, and what is committed leaves
    the others as they were. It can be pushed to where the content of the others is.

    Cloning again what is here under that name pulls. A clone that was cut goes on where it
    stopped when it is run again.
    """
    from dmsync.engine.sync_pull import FetchRequest
    from dmsync.surfaces.cli.connection import fetch, find_remote

    name = _required(remote, "clone from")
    if dot is None:
        raise UsageError("Please specify which dot to clone", hint="dm clone REMOTE DOT")
    if as_root and at is None:
        raise UsageError("--as-root says what the directory of --at is", hint="give --at DIR")
    there_namespace, there_name = _plain_name(dot)
    here_namespace, here_name = _plain_name(there_name if local_name is None else local_name)
    with invocation.open_store(create=not invocation.dry_run) as store:
        there = find_remote(invocation, store, name)
        request = FetchRequest(
            remote=there.name,
            remote_namespace=there_namespace,
            remote_name=there_name,
            branches=(branch,) if branch else None,
            move="stash" if stash else "ff",
            local_namespace=here_namespace or invocation.settings.namespace,
            local_name=here_name,
            depth=depth or 0,
            subdots=_checked_subdots(subdots, at, as_root=as_root),
            dry_run=invocation.dry_run,
            accept_rewind=invocation.accept_rewind,
            command="clone",
            actor=invocation.settings.actor,
        )
        title = f"Cloning {here_name} from {there.name}:{dot}"
        if at is not None:
            _check_target(store, at, here_namespace or invocation.settings.namespace, here_name)
        summary = _announced(
            invocation, title, lambda: fetch(invocation, store, there, request), _clone_outcome
        )
        _tell_kept_tags(invocation, there.name, summary)
        _tell_standing(invocation, there.name, summary)
        become_current(store, summary.dot)
        fields = fetch_fields(summary)
        if at is not None and not invocation.dry_run:
            fields["tree"] = _write_tree(invocation, store, summary.dot, at, as_root)
    if not invocation.as_json:
        invocation.result(_clone_end(summary, invocation.dry_run))
    if invocation.as_json:
        invocation.summary({"remote": there.name, **fields})
    return _code_of(fields)


_STANDINGS: Final = {
    "rewound": "was put back to an older state; what it had is in the reflog of remote/{0}/BRANCH",
    "new-epoch": "lost the end of its log and began a new epoch: compare what it has with yours",
    "other-store": "is another store than the one that answered there before",
}


def _tell_standing(
    invocation: Invocation, remote: str, summary: "PushSummary | FetchSummary"
) -> None:
    """A remote that is not what it was is worth a word, also where it does no harm."""
    if summary.remote_standing:
        invocation.warn(f"{remote} {_STANDINGS[summary.remote_standing].format(remote)}")


def _tell_kept_tags(invocation: Invocation, remote: str, summary: "FetchSummary") -> None:
    if summary.tags_kept:
        names = ", ".join(summary.tags_kept[:_TAGS_SHOWN_MAX])
        invocation.warn(
            f"tags that stand for something else at {remote} stayed as they are here "
            f"(dm pull --force takes those): {names}"
        )


def _checked_subdots(
    subdots: tuple[str, ...], at: str | None, *, as_root: bool
) -> tuple[str, ...] | None:
    """The subdots to keep, in order and each once; None for all. Raises UsageError."""
    from dmsync.engine.trees import DEFAULT_SUBDOT
    from dmsync.wire.limits import SUBDOTS_MAX
    from dmsync.wire.messages import is_subdot_name

    chosen = tuple(sorted(set(subdots)))
    for name in chosen:
        if not is_subdot_name(name):
            raise UsageError(f"not a subdot's name: {output.escape_name(name)}")
    if len(chosen) > SUBDOTS_MAX:
        raise UsageError(f"more than {SUBDOTS_MAX} subdots")
    default = DEFAULT_SUBDOT.decode()
    if chosen and at is not None and not as_root and chosen != (default,):
        raise UsageError(
            f"the directory of --at is the subdot {default}", hint="--as-root makes it the tree"
        )
    return chosen or None


def _clone_outcome(summary: "FetchSummary", dry_run: bool) -> Iterable[str]:
    """No end: a clone is done when its tree is written, too."""
    return _content_lines(summary)


def _clone_end(summary: "FetchSummary", dry_run: bool) -> str:
    if dry_run:
        return "Nothing was cloned (dry run)."
    return "Already up to date." if summary.nothing_to_do and not summary.created else "Done!"


def _check_target(store: "Store", at: str, namespace: str, name: str) -> None:
    """Refuse a directory before anything is transferred."""
    from dmsync.engine.dots import refuse_target

    row = store.catalog.dot_by_name(namespace, name)
    refuse_target(store, at, None if row is None else row.dot)


def _write_tree(
    invocation: Invocation, store: "Store", dot: "DotId", at: str, as_root: bool
) -> str:
    """Attach the directory to the cloned dot; returns its path, text for JSON."""
    from dmsync.engine.dots import attach_dot

    row = store.catalog.dot(dot)
    assert row is not None, "it was just cloned"
    with invocation.progress(f"writing {row.name}") as progress:
        path = attach_dot(store, row, at=at, as_root=as_root, progress=progress)
    return path.decode("utf-8", "replace")


def become_current(store: "Store", dot: "DotId") -> None:
    """The first dot of a store is the one that commands mean."""
    from dmsync.core.events import CurrentDotSwitched

    if store.catalog.current_dot() is None and store.catalog.dot(dot) is not None:
        with store.transaction("clone") as tx:
            tx.append(CurrentDotSwitched(dot))


def fetch_fields(summary: "FetchSummary") -> dict[str, object]:
    """JSON of a fetch, pull or clone."""
    fields = _plain_fields(summary, ("dot", "refs", "tracking", "remote_tips", "new_commits"))
    fields["dot_id"] = summary.dot.hex()
    fields["refs"] = [
        {
            "ref": ref.ref,
            "status": ref.status.name.lower(),
            "old": ref.old.hex() if ref.old else None,
            "new": ref.new.hex() if ref.new else None,
            "stash": ref.stash,
        }
        for ref in summary.refs
    ]
    fields["tracking"] = [
        {"ref": name, "old": old.hex() if old else None, "new": new.hex()}
        for name, old, new in summary.tracking
    ]
    return fields
