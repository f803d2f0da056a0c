"""`dm log`: the commits of a branch."""

import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.invocation import DmCommand, Invocation, query_options

if TYPE_CHECKING:
    from dmsync.engine.history import CommitInfo

_INDENT = "    "


@click.command("log", cls=DmCommand, epilog="Example: dm log -n 5 --reverse")
@click.argument("revision", metavar="[REV|A..B]", required=False)
@click.option("-n", "--max-count", "newest", type=click.IntRange(0), metavar="N", help="Newest N.")
@click.option("--reverse", is_flag=True, help="Newest first.")
@click.option("--graph", is_flag=True, help="Draw the lines of history beside it.")
@click.option("--oneline", is_flag=True, help="One line a commit: short id and subject.")
@query_options
@click.pass_obj
def log_command(
    invocation: Invocation,
    revision: str | None,
    newest: int | None,
    reverse: bool,
    graph: bool,
    oneline: bool,
) -> None:
    """Show the commits up to REV (default HEAD), or those of B that A lacks, oldest first."""
    from dmsync.engine.history import log_commits

    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        commits = log_commits(store, dot, revision, newest)
    if not reverse:
        commits.reverse()
    if invocation.as_json:
        invocation.document([commit_fields(commit) for commit in commits])
        return
    for line in _graph(commits, oneline=oneline) if graph else _plain(commits, oneline=oneline):
        output.write_line(line)


def _plain(commits: Sequence["CommitInfo"], *, oneline: bool) -> Iterator[str]:
    for commit in commits:
        yield from [_one_line(commit)] if oneline else commit_lines(commit)


def _graph(commits: Sequence["CommitInfo"], *, oneline: bool) -> Iterator[str]:
    """As _plain, with the drawing; a commit leads to its parents or children shown later."""
    from dmsync.surfaces.cli.graph_lines import GraphLanes

    position = {commit.id: number for number, commit in enumerate(commits)}
    following: list[list[bytes]] = [[] for _ in commits]
    for number, commit in enumerate(commits):
        for parent in commit.parents:
            other = position.get(parent)
            if other is None:
                continue
            if other > number:
                following[number].append(parent)
            else:
                following[other].append(commit.id)
    lanes: GraphLanes[bytes] = GraphLanes()
    for commit, after in zip(commits, following, strict=True):
        text = [_one_line(commit)] if oneline else commit_lines(commit)
        yield from lanes.place(commit.id, after).beside_text(text)


def _one_line(commit: "CommitInfo") -> str:
    subject = commit.message.strip().split("\n", 1)[0]
    return (
        f"{commit.id.hex()[: output.SHORT_ID_DIGITS]}{_refs(commit)} {output.escape_name(subject)}"
    )


def _refs(commit: "CommitInfo") -> str:
    """Names of what points at the commit, for people: scripts read `commit ID` or --json."""
    if not commit.refs or not sys.stdout.isatty():
        return ""
    return f" ({', '.join(map(output.escape_name, commit.refs))})"


def commit_lines(commit: "CommitInfo") -> Iterator[str]:
    """A commit as Dotmesh prints it: id, author, date, metadata, blank, indented message, blank."""
    yield f"commit {commit.id.hex()}{_refs(commit)}"
    if len(commit.parents) > 1:
        yield "Merge: " + " ".join(p.hex()[: output.SHORT_ID_DIGITS] for p in commit.parents)
    yield f"Author: {output.escape_name(commit.author)}"
    yield f"Date: {output.human_date(commit.time_ns, commit.offset_minutes)}"
    for key, value in commit.metadata:
        yield f"{output.escape_name(key)}: {output.escape_name(value)}"
    yield ""
    for line in output.escape_text(commit.message).rstrip("\n").split("\n"):
        yield f"{_INDENT}{line}".rstrip()
    yield ""


def commit_fields(commit: "CommitInfo") -> dict[str, object]:
    """JSON of a commit."""
    fields: dict[str, object] = {
        "id": commit.id.hex(),
        "parents": [parent.hex() for parent in commit.parents],
        "author": commit.author,
        "committer": commit.committer,
        "date": output.iso_date(commit.time_ns, commit.offset_minutes),
        "message": commit.message,
        "metadata": dict(commit.metadata),
        "generation": commit.generation,
        "refs": list(commit.refs),
    }
    if commit.capture is not None:
        driver, consistency, pause_us = commit.capture
        fields["capture"] = {"driver": driver, "consistency": consistency}
        fields["capture_pause_ms"] = pause_us / 1000
    return fields
