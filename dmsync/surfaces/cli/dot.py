"""`dm dot show|path|delete|rename|set-upstream`: one dot and where it lives."""

import sys
from typing import TYPE_CHECKING

import click

from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.completions import DOT, DOT_OR_REMOTE, REMOTE, Words
from dmsync.surfaces.cli.invocation import (
    DmCommand,
    Invocation,
    changing_options,
    query_options,
)

if TYPE_CHECKING:
    from dmsync.engine.branches import BranchSummary
    from dmsync.engine.dots import DotDetails


@click.group("dot", epilog="Example: dm dot show app")
def dot_command() -> None:
    """Show, rename, delete a dot; find its directory; set where it is pushed to."""


@dot_command.command("show", cls=DmCommand, epilog="Example: dm dot show -H app | grep ^dirty")
@click.argument("dot", required=False, type=DOT)
@click.option("-H", "--scripting", is_flag=True, help="TAB-separated lines, sizes in bytes.")
@query_options
@click.pass_obj
def show_command(invocation: Invocation, dot: str | None, scripting: bool) -> None:
    """Show a dot's branches, sizes, directory and upstreams (default: the current dot)."""
    from dmsync.engine.dots import show_dot

    with invocation.open_store() as store:
        details = show_dot(store, dot or invocation.settings.dot)
    if invocation.as_json:
        invocation.document(_json_fields(details))
    else:
        lines = _scripting_lines(details) if scripting else _human_lines(details)
        for line in lines:
            output.write_line(line)


def _full_name(details: "DotDetails") -> str:
    namespace = details.summary.namespace
    return f"{namespace}/{details.summary.name}" if namespace else details.summary.name


def _tip(branch: "BranchSummary") -> str:
    return "" if branch.tip is None else branch.tip.hex()


def _human_lines(details: "DotDetails") -> list[str]:
    dot = details.summary
    lines = [f"Dot {_full_name(details)}:", f"Master branch ID: {details.master_branch_id}"]
    if dot.current:
        lines.append("Dot is currently selected.")
    hollow = details.hollow_commits
    lines.append(f"Commits: {dot.commits}" + (f" ({hollow} without content)" if hollow else ""))
    if details.subdots is not None:
        lines.append(f"Subdots kept here: {', '.join(map(output.escape_name, details.subdots))}")
    size = output.human_size(dot.size_bytes)
    if dot.dirty_bytes:
        lines.append(f"Dot size: {size} ({output.human_size(dot.dirty_bytes)} dirty)")
    else:
        lines.append(f"Dot size: {size} (all clean)")
    if details.tree_path is not None:
        lines.append(f"Directory: {output.escape_name(details.tree_path)}")
    lines.append("Branches:")
    for branch in details.branches:
        mark = "*" if branch.current else " "
        lines.append(f"{mark} {branch.name} ({_tip(branch) or 'no commits'})")
    if details.collaborators:
        lines.append(f"Collaborators: {', '.join(details.collaborators)}")
    for remote, remote_dot in details.upstreams:
        lines.append(f"Tracks dot {remote_dot} on remote {remote}")
    return lines


def _scripting_lines(details: "DotDetails") -> list[str]:
    dot = details.summary
    pairs: list[tuple[str, ...]] = [
        ("namespace", dot.namespace),
        ("name", dot.name),
        ("masterBranchId", details.master_branch_id),
        ("selected", "true" if dot.current else "false"),
        ("commitCount", str(dot.commits)),
        ("hollowCommitCount", str(details.hollow_commits)),
        ("size", str(dot.size_bytes)),
        ("dirty", "" if dot.dirty_bytes is None else str(dot.dirty_bytes)),
        ("currentBranch", dot.branch),
    ]
    pairs += [("branch", _tip(branch), branch.name) for branch in details.branches]
    pairs += [("container", dot.branch, name) for name in dot.containers]
    pairs += [("collaborator", user) for user in details.collaborators]
    pairs += [("defaultUpstreamDot", remote, name) for remote, name in details.upstreams]
    if details.tree_path is not None:
        pairs.append(("directory", output.escape_name(details.tree_path)))
    return ["\t".join(map(output.escape_name, fields)) for fields in pairs]


def _json_fields(details: "DotDetails") -> dict[str, object]:
    dot = details.summary
    fields: dict[str, object] = {
        "namespace": dot.namespace,
        "name": dot.name,
        "id": dot.id.hex(),
        "current": dot.current,
        "branch": dot.branch,
        "commits": dot.commits,
        "hollow_commits": details.hollow_commits,
        "subdots": None if details.subdots is None else list(details.subdots),
        "size_bytes": dot.size_bytes,
        "dirty_bytes": dot.dirty_bytes,
        "master_branch_id": details.master_branch_id,
        "containers": dot.containers,
        "attached": details.attached,
        "branches": [
            {
                "name": branch.name,
                "tip": _tip(branch) or None,
                "current": branch.current,
                "commits": branch.commits,
                "origin": branch.origin,
            }
            for branch in details.branches
        ],
        "collaborators": list(details.collaborators),
        "upstreams": [{"remote": remote, "dot": name} for remote, name in details.upstreams],
    }
    if details.tree_path is not None:
        fields.update(output.path_fields(details.tree_path))
    return fields


@dot_command.command("path", cls=DmCommand, epilog="Example: cd $(dm dot path app.__root__)")
@click.argument("dot", metavar="[DOT[@BRANCH][.SUBDOT]]", required=False, type=DOT)
@query_options
@click.pass_obj
def path_command(invocation: Invocation, dot: str | None) -> None:
    """Print the directory to mount or write into; it is made when needed.

    The subdot is __default__ unless named; __root__ is the whole tree.
    """
    from dmsync.engine.dots import dot_path

    with invocation.open_store() as store:
        path = dot_path(store, dot or invocation.settings.dot)
    if invocation.as_json:
        invocation.document(output.path_fields(path))
        return
    sys.stdout.flush()
    # Exact bytes, not escaped: this answer is for $(...), not for reading.
    sys.stdout.buffer.write(path + b"\n")


@dot_command.command("delete", cls=DmCommand, epilog="Example: dm dot delete -f old")
@click.argument("dot", type=DOT)
@click.option("-f", "--force", is_flag=True, help="Do not ask.")
@changing_options
@click.pass_obj
def delete_command(invocation: Invocation, dot: str, force: bool) -> int:
    """Delete DOT with all branches and commits. It can be brought back until the grace is over.

    A directory given with init --at stays where it is.
    """
    from dmsync.engine.dots import delete_dot

    with invocation.open_store() as store:
        row = invocation.resolve_dot(store, dot)
        question = (
            f"Please confirm that you really want to delete the dot {dot}, "
            "including all branches and commits? (enter Y to continue): "
        )
        if invocation.dry_run:
            invocation.talk(f"would delete dot {dot}")
        elif force or invocation.confirm(question):
            delete_dot(store, dot)
        else:
            invocation.talk("Aborted.")
            return 1
    if invocation.as_json:
        invocation.summary({"dot": row.name, "namespace": row.namespace, "id": row.dot.hex()})
    return 0


@dot_command.command("rename", cls=DmCommand, epilog="Example: dm dot rename app shop")
@click.argument("old", type=DOT)
@click.argument("new")
@changing_options
@click.pass_obj
def rename_command(invocation: Invocation, old: str, new: str) -> None:
    """Give a dot another name here. Its id, history and upstreams stay."""
    from dmsync.core.names import parse_dot_name
    from dmsync.engine.dots import rename_dot

    parse_dot_name(new)
    with invocation.open_store() as store:
        row = invocation.resolve_dot(store, old)
        if invocation.dry_run:
            invocation.talk(f"would rename dot {old} to {new}")
        else:
            rename_dot(store, old, new)
    if invocation.as_json:
        invocation.summary({"old": old, "new": new, "id": row.dot.hex()})


@dot_command.command(
    "set-upstream", cls=DmCommand, epilog="Example: dm dot set-upstream backup company/app"
)
@click.argument(
    "arguments",
    metavar="[DOT] REMOTE REMOTE-DOT",
    nargs=-1,
    type=Words(DOT_OR_REMOTE, REMOTE, None),
)
@changing_options
@click.pass_obj
def set_upstream_command(invocation: Invocation, arguments: tuple[str, ...]) -> None:
    """Say which dot of REMOTE this dot is pushed to and pulled from by default."""
    from dmsync.core.names import parse_dot_name
    from dmsync.engine.dots import set_upstream
    from dmsync.engine.remotes import find_remote

    if len(arguments) not in (2, 3):
        raise click.UsageError("expected [DOT] REMOTE REMOTE-DOT", ctx=click.get_current_context())
    dot = arguments[0] if len(arguments) == 3 else None
    remote, remote_dot = arguments[-2:]
    with invocation.open_store() as store:
        row = invocation.resolve_dot(store, dot)
        if invocation.dry_run:
            find_remote(store, remote)
            parse_dot_name(remote_dot)
            invocation.talk(f"would push dot {row.name} to {remote_dot} of {remote}")
        else:
            set_upstream(store, dot or invocation.settings.dot, remote, remote_dot)
    if invocation.as_json:
        invocation.summary({"dot": row.name, "remote": remote, "remote_dot": remote_dot})
