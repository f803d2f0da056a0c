"""`dm log`: the commits of a branch. `dm blame`: the last commit that changed each path."""

import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import click

from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.changes import stat_line
from dmsync.surfaces.cli.completions import RANGE, REVISION, paths_follow
from dmsync.surfaces.cli.invocation import DmCommand, Invocation, query_options
from dmsync.surfaces.cli.signing import (
    SignatureReader,
    signature_reader,
    verdict_fields,
    verdict_text,
)

if TYPE_CHECKING:
    from dmsync.engine.blame import BlamedPath
    from dmsync.engine.commit_info import CommitInfo
    from dmsync.engine.differences import Change
    from dmsync.engine.log import CommitLog, LogQuery
    from dmsync.engine.store import Store

_INDENT = "    "
NOT_HERE = "the content of this commit or its parent is not here"


class PathsCommand(DmCommand):
    """A command whose words after `--` are paths of a dot's tree: it gets them as `paths`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        divider = args.index("--") if "--" in args else len(args)
        if divider < len(args):
            paths_follow(ctx)
        rest = super().parse_args(ctx, args[:divider])
        ctx.params["paths"] = tuple(map(os.fsencode, args[divider + 1 :]))
        return rest

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return [*super().collect_usage_pieces(ctx), "[-- PATH...]"]


@click.command(
    "log",
    cls=PathsCommand,
    epilog="Example: dm log master..topic --since '2 weeks ago' -- __default__/stock.txt",
)
@click.argument("revisions", metavar="[REV|A..B|^REV]...", nargs=-1, type=RANGE)
@click.option("-n", "--max-count", "newest", type=click.IntRange(0), metavar="N", help="Newest N.")
@click.option("--reverse", is_flag=True, help="Newest first.")
@click.option("--graph", is_flag=True, help="Draw the lines of history beside it.")
@click.option("--oneline", is_flag=True, help="One line a commit: short id and subject.")
@click.option("--stat", is_flag=True, help="Files and bytes changed against the first parent.")
@click.option("--author", metavar="TEXT", help="Only commits whose author holds TEXT.")
@click.option("--grep", "message", metavar="TEXT", help="Only those whose message holds TEXT.")
@click.option("--since", metavar="TIME", help="Only those of TIME (2026-11-21, 2 days ago) or on.")
@click.option("--until", metavar="TIME", help="Only those of TIME or before.")
@click.option(
    "--meta",
    "metadata",
    metavar="KEY[=VALUE]",
    multiple=True,
    help="Only those with this metadata; may be given again.",
)
@click.option("--merges/--no-merges", default=None, help="Only merges, or none of them.")
@click.option("--first-parent", is_flag=True, help="Of a merge follow only the first parent.")
@click.option("--show-signature", is_flag=True, help="Check the signatures (see dm verify).")
@query_options
@click.pass_obj
def log_command(
    invocation: Invocation,
    revisions: tuple[str, ...],
    newest: int | None,
    reverse: bool,
    graph: bool,
    oneline: bool,
    stat: bool,
    author: str | None,
    message: str | None,
    since: str | None,
    until: str | None,
    metadata: tuple[str, ...],
    merges: bool | None,
    first_parent: bool,
    show_signature: bool,
    paths: tuple[bytes, ...],
) -> None:
    """Show the commits up to each REV (default HEAD), oldest first.

    A..B shows those of B that A lacks, A...B those that only one of them has, ^REV leaves out what
    REV has.

    With paths (such as __default__/stock.txt; a directory stands for all that is below it) only
    commits that changed one of them against their parent. A merge that took the paths unchanged
    from one of its parents is left out, and only that parent's side is followed, as git does: what
    is shown explains how the paths came to be what they are.
    """
    from dmsync.engine.log import LogQuery, find_commits
    from dmsync.engine.path_history import tree_path
    from dmsync.engine.revision_lookup import time_told

    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        query = LogQuery(
            revisions=revisions,
            paths=tuple(map(tree_path, paths)),
            author=author,
            message=message,
            since_ns=None if since is None else time_told(store, since),
            until_ns=None if until is None else time_told(store, until),
            metadata=tuple(map(_key_and_value, metadata)),
            merges=merges,
            first_parent=first_parent,
            newest=newest,
        )
        found = find_commits(store, dot, query)
        if found.unknown_count:
            invocation.warn(
                "the content of some commits is not here: whether they changed the paths is not "
                "known, so they are shown"
            )
        commits = found.commits if reverse else found.commits[::-1]
        changes = _Changes(store, dot.dot, query) if stat else None
        signatures = signature_reader(invocation, store, dot.dot) if show_signature else None
        if invocation.as_json:
            invocation.document([_log_fields(commit, changes, signatures) for commit in commits])
            return
        texts = (_text(commit, changes, signatures, oneline=oneline) for commit in commits)
        for line in _graph(found, commits, texts) if graph else _plain(texts):
            output.write_line(line)


def _key_and_value(text: str) -> tuple[str, str | None]:
    key, equals, value = text.partition("=")
    return key, value if equals else None


class _Changes:
    """What each listed commit changed at the paths asked for."""

    def __init__(self, store: "Store", dot: bytes, query: "LogQuery") -> None:
        from dmsync.core.ids import DotId
        from dmsync.engine.path_history import PathSet

        self._store = store
        self._dot = DotId(dot)
        self._wanted = PathSet(query.paths or (b"",))

    def of(self, commit: "CommitInfo") -> "list[Change] | None":
        from dmsync.engine.log import changes_of

        return changes_of(self._store, self._dot, commit, self._wanted)


def _log_fields(
    commit: "CommitInfo", changes: _Changes | None, signatures: SignatureReader | None
) -> dict[str, object]:
    fields = commit_fields(commit)
    if signatures is not None:
        fields["signature"] = verdict_fields(signatures.of_commit(commit.id))
    if changes is not None:
        found = changes.of(commit)
        fields["stat"] = None if found is None else _stat_fields(found)
    return fields


def _stat_fields(changes: "Sequence[Change]") -> dict[str, int]:
    sizes = [
        (change.old.size if change.old else 0, change.new.size if change.new else 0)
        for change in changes
    ]
    return {
        "files": len(changes),
        "bytes_written": sum(
            new for change, (_, new) in zip(changes, sizes, strict=True) if not change.metadata_only
        ),
        "bytes_grown": sum(new - old for old, new in sizes),
    }


def _text(
    commit: "CommitInfo",
    changes: _Changes | None,
    signatures: SignatureReader | None,
    *,
    oneline: bool,
) -> list[str]:
    lines = [_one_line(commit)] if oneline else list(commit_lines(commit))
    if signatures is not None:
        lines.insert(1, f"Signature: {verdict_text(signatures.of_commit(commit.id))}")
    if changes is not None:
        found = changes.of(commit)
        lines.append(f" {NOT_HERE if found is None else stat_line(found)}")
        if not oneline:
            lines.append("")
    return lines


def _plain(texts: Iterable[list[str]]) -> Iterator[str]:
    for text in texts:
        yield from text


def _graph(
    found: "CommitLog", commits: "Sequence[CommitInfo]", texts: Iterable[list[str]]
) -> Iterator[str]:
    """As _plain, with the drawing; a commit leads to its ancestors or descendants shown later."""
    from dmsync.surfaces.cli.graph_lines import GraphLanes

    position = {commit.id: number for number, commit in enumerate(commits)}
    following: list[list[bytes]] = [[] for _ in commits]
    for number, commit in enumerate(commits):
        for ancestor in found.lines[commit.id]:
            other = position[ancestor]
            if other > number:
                following[number].append(ancestor)
            else:
                following[other].append(commit.id)
    lanes: GraphLanes[bytes] = GraphLanes()
    for commit, after, text in zip(commits, following, texts, strict=True):
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
    names = (output.escape_name(name) for name in commit.refs)
    return f" ({', '.join(re.sub('^tag/', 'tag: ', name) for name in names)})"


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
    if commit.is_hollow:
        fields["hollow"] = True
    return fields


@click.command(
    "blame", cls=PathsCommand, epilog="Example: dm blame HEAD~3 -r -- __default__/reports"
)
@click.argument("revision", metavar="[REV]", default="HEAD", type=REVISION)
@click.option("-r", "--recursive", is_flag=True, help="All files below, instead of the entries.")
@query_options
@click.pass_obj
def blame_command(
    invocation: Invocation, revision: str, recursive: bool, paths: tuple[bytes, ...]
) -> None:
    """Show which commit last changed each path: short id, date, author, path.

    Of a directory each of its entries, of a file itself; without PATH the subdots. ^ before an id
    says that the path may have changed earlier: the content of that commit's parents is not here.
    """
    from dmsync.engine.blame import blame
    from dmsync.engine.path_history import tree_path

    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        asked = tuple(map(tree_path, paths)) or (b"",)
        found = blame(store, dot, revision, asked, recursive=recursive)
    if invocation.as_json:
        invocation.document([_blame_fields(blamed) for blamed in found])
        return
    for line in output.table(_blame_row(blamed) for blamed in found):
        output.write_line(line)


def _blame_row(blamed: "BlamedPath") -> tuple[str, ...]:
    commit = blamed.commit
    mark = "^" if blamed.is_boundary else ""
    return (
        mark + commit.id.hex()[: output.SHORT_ID_DIGITS],
        output.iso_date(commit.time_ns, commit.offset_minutes)[:16].replace("T", " "),
        output.escape_name(commit.author),
        output.escape_name(blamed.path),
    )


def _blame_fields(blamed: "BlamedPath") -> dict[str, object]:
    commit = blamed.commit
    return {
        **output.path_fields(blamed.path),
        "commit": commit.id.hex(),
        "author": commit.author,
        "date": output.iso_date(commit.time_ns, commit.offset_minutes),
        "message": commit.message,
        "boundary": blamed.is_boundary,
    }
