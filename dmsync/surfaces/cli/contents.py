"""`dm show`, `dm ls`, `dm cat`: what commits hold."""

import sys
from typing import TYPE_CHECKING, Final

import click

from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.changes import change_fields, change_line, stat_line
from dmsync.surfaces.cli.completions import PLACE, REVISION
from dmsync.surfaces.cli.invocation import DmCommand, Invocation, query_options
from dmsync.surfaces.cli.log import NOT_HERE, commit_fields, commit_lines
from dmsync.surfaces.cli.signing import signature_reader, verdict_fields, verdict_text
from dmsync.surfaces.cli.tag import shown_tag

if TYPE_CHECKING:
    from dmsync.core.objects import Entry

_KIND_LETTERS: Final = "-dlpcb"
"""By EntryKind: file, directory, symlink, fifo, character device, block device."""
_KIND_WORDS: Final = (
    "file", "directory", "symlink", "fifo", "character-device", "block-device",
)  # fmt: skip


@click.command("show", cls=DmCommand, epilog="Example: dm show HEAD~1 --stat")
@click.argument("revision", metavar="[REV]", default="HEAD", type=REVISION)
@click.option("--stat", is_flag=True, help="Show sizes and a closing line of totals.")
@click.option("--show-signature", is_flag=True, help="Check the signatures (see dm verify).")
@query_options
@click.pass_obj
def show_command(invocation: Invocation, revision: str, stat: bool, show_signature: bool) -> None:
    """Show a commit (default HEAD) and what it changed against its first parent.

    Of an annotated tag its annotation, then the commit.
    """
    from dmsync.engine.history import show

    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        commit, changes = show(store, dot, revision)
        signatures = signature_reader(invocation, store, dot.dot) if show_signature else None
        tag = shown_tag(store, dot, revision, signatures)
        verdict = signatures.of_commit(commit.id) if signatures else None
    if invocation.as_json:
        fields = commit_fields(commit)
        if tag is not None:
            fields["tag"] = tag.fields
        if verdict is not None:
            fields["signature"] = verdict_fields(verdict)
        found = None if changes is None else [change_fields(change) for change in changes]
        fields["changes"] = found
        invocation.document(fields)
        return
    lines = list(commit_lines(commit))
    if verdict is not None:
        lines.insert(1, f"Signature: {verdict_text(verdict)}")
    for line in [*(tag.lines if tag else ()), *lines]:
        output.write_line(line)
    if changes is None:
        invocation.talk(NOT_HERE)
        return
    for change in changes:
        output.write_line(change_line(change, stat=stat))
    if stat:
        output.write_line(stat_line(changes))


@click.command("ls", cls=DmCommand, epilog="Example: dm ls HEAD:__default__/logs -l")
@click.argument("place", metavar="[REV:PATH]", type=PLACE, required=False)
@click.option("-l", "--long", "long_form", is_flag=True, help="Mode, owner, size and time too.")
@click.option("-H", "--scripting", is_flag=True, hidden=True)
@query_options
@click.pass_obj
def ls_command(invocation: Invocation, place: str | None, long_form: bool, scripting: bool) -> None:
    """List a directory of a commit; its first level are the subdots. Without REV:PATH: dm list."""
    from dmsync.engine.history import list_path

    if place is None:
        from dmsync.surfaces.cli.dots import print_dots

        print_dots(invocation, scripting=scripting)
        return
    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        found = list_path(store, dot, place)
    if invocation.as_json:
        invocation.document([_entry_fields(path, entry) for path, entry in found])
        return
    for path, entry in found:
        if long_form:
            output.write_line(_long_line(path, entry))
        else:
            output.write_line(output.escape_name(path) + ("/" if entry.kind == 1 else ""))


def _long_line(path: bytes, entry: "Entry") -> str:
    owner = f"{entry.uid}:{entry.gid}"
    name = output.escape_name(path)
    if entry.link_target:
        name += f" -> {output.escape_name(entry.link_target)}"
    when = output.iso_date(entry.mtime_ns)[:19]
    return f"{_mode_text(entry)} {owner:>11} {entry.size:>12} {when} {name}"


def _mode_text(entry: "Entry") -> str:
    import stat

    letters = stat.filemode(entry.mode)[1:]
    return _KIND_LETTERS[entry.kind] + letters


def _entry_fields(path: bytes, entry: "Entry") -> dict[str, object]:
    fields: dict[str, object] = {
        **output.path_fields(path),
        "kind": _KIND_WORDS[entry.kind],
        "mode": f"{entry.mode:04o}",
        "uid": entry.uid,
        "gid": entry.gid,
        "size": entry.size,
        "mtime": output.iso_date(entry.mtime_ns),
    }
    if entry.link_target:
        fields.update(output.path_fields(entry.link_target, "link_target"))
    return fields


@click.command("cat", cls=DmCommand, epilog="Example: dm cat HEAD~3:__default__/app.conf")
@click.argument("place", metavar="REV:PATH", type=PLACE)
@query_options
@click.pass_obj
def cat_command(invocation: Invocation, place: str) -> None:
    """Print the bytes of a file as a commit holds it. (--json: one line a piece, in base64.)"""
    from dmsync.engine.history import read_path

    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        total = 0
        sys.stdout.flush()
        for piece in read_path(store, dot, place):
            total += len(piece)
            if invocation.as_json:
                _write_piece(piece)
            else:
                sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    if invocation.as_json:
        invocation.summary({"size": total})


def _write_piece(piece: bytes) -> None:
    from base64 import b64encode

    output.write_json_line({"type": "content", "content_b64": b64encode(piece).decode("ascii")})
