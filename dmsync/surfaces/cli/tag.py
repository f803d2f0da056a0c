"""`dm tag` and `dm verify`: names for commits that stay, and who vouches for them."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from dmsync.errors import BadSignature, ConfigError, UsageError
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.completions import RANGE, REVISION, TAG, StoredName, Words
from dmsync.surfaces.cli.invocation import (
    FILE_NAME,
    DmCommand,
    Invocation,
    changing_options,
    query_options,
)
from dmsync.surfaces.cli.signing import (
    SignatureReader,
    allowed_signers,
    key_option,
    signing_key,
    verdict_fields,
    verdict_text,
)

if TYPE_CHECKING:
    from dmsync.core.ids import Kind, ObjectId
    from dmsync.core.objects import Tag
    from dmsync.engine.signatures import Verdict
    from dmsync.engine.store import Store
    from dmsync.engine.tagging import TagInfo, TagRequest, TagSummary
    from dmsync.storage.catalog import DotRow


class _TagWords(Words):
    """A new tag and a revision, or with -d and --verify tags."""

    def types_here(self, context: click.Context) -> tuple[StoredName | None, ...]:
        given = context.params
        is_about_tags = given.get("delete") or given.get("verify")
        return (TAG,) if is_about_tags else super().types_here(context)


@click.command("tag", cls=DmCommand, epilog='Example: dm tag v1.0 HEAD~2 -m "as delivered"')
@click.argument("arguments", metavar="[NAME [REV]]", nargs=-1, type=_TagWords(None, REVISION))
@click.option("-m", "--message", help="Annotate: keep who tagged, when and why.")
@click.option("-a", "--annotate", is_flag=True, help="Annotate (needs -m).")
@click.option("-s", "--sign", "is_signed", is_flag=True, help="Annotate and sign (needs -m).")
@key_option
@click.option("-f", "--force", is_flag=True, help="Move a tag that is there.")
@click.option("-d", "--delete", is_flag=True, help="Delete the tags NAME...")
@click.option("--verify", is_flag=True, help="Check the signatures of tags NAME... (also -v NAME).")
@click.option("-l", "--list", "patterns", multiple=True, metavar="PATTERN", help="As 'v1.*'.")
@click.option("-N", "--lines", type=click.IntRange(0), metavar="N", help="N lines of the messages.")
@click.option("--contains", type=REVISION, metavar="REV", help="Only tags whose history has REV.")
@changing_options
@click.pass_obj
def tag_command(
    invocation: Invocation,
    arguments: tuple[str, ...],
    message: str | None,
    annotate: bool,
    is_signed: bool,
    key: str | None,
    force: bool,
    delete: bool,
    verify: bool,
    patterns: tuple[str, ...],
    lines: int | None,
    contains: str | None,
) -> None:
    """List the tags, or name the commit REV (default HEAD) for good.

    A tag stays where it is until --force moves it. Annotated ones record who tagged, when and
    why, and can be signed. dm push --tags sends them.
    """
    # -v is --verbose everywhere, but those who know git expect this of it
    is_plain = not (message or annotate or is_signed or key or force or delete)
    verify = verify or bool(invocation.verbose and arguments and is_plain)
    is_listing = bool(patterns) or lines is not None or contains is not None
    if sum((delete, verify, is_listing)) > 1:
        raise UsageError("one of -d, -v and listing")
    if (delete or verify) and not arguments:
        raise UsageError("which tags?", hint="dm tag -d NAME...")
    if is_listing and arguments:
        raise UsageError("listing takes no NAME", hint="dm tag -l PATTERN")
    if verify:
        _verify(invocation, [f"tag/{name}" for name in arguments], None)
        return
    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        if delete:
            _delete(invocation, store, dot, arguments)
        elif not arguments:
            if not is_plain:
                raise UsageError("which name?", hint="dm tag NAME [REV]")
            _list(invocation, store, dot, patterns, lines or 0, contains)
        else:
            signing = signing_key(invocation, key, wanted=is_signed)
            if len(arguments) > 2:
                raise UsageError("dm tag NAME [REV]: too many arguments")
            if message is None and (annotate or signing is not None):
                raise UsageError(
                    "an annotated tag needs a message", hint='dm tag NAME -m "MESSAGE"'
                )
            from dmsync.engine.tagging import TagRequest

            _create(
                invocation,
                store,
                dot,
                TagRequest(
                    arguments[0],
                    arguments[1] if len(arguments) > 1 else "HEAD",
                    message=message,
                    signing=signing,
                    force=force,
                    dry_run=invocation.dry_run,
                ),
            )


# --- changing ------------------------------------------------------------------------------------


def _create(invocation: Invocation, store: "Store", dot: "DotRow", request: "TagRequest") -> None:
    from dmsync.engine.tagging import create_tag

    made = create_tag(store, dot, request)
    if invocation.as_json:
        invocation.summary(_made_fields(made, dry_run=invocation.dry_run))
        return
    verb = "Would tag" if invocation.dry_run else "Tagged"
    invocation.talk(f"{verb} {made.commit.hex()} as {made.name}")
    if made.old is not None and made.old != made.target:
        invocation.talk(f"{made.name} was {made.old.hex()}")


def _made_fields(made: "TagSummary", *, dry_run: bool) -> dict[str, object]:
    return {
        "tag": made.name,
        "commit": made.commit.hex(),
        "target": made.target.hex() if made.target else None,
        "old": made.old.hex() if made.old else None,
        "annotated": made.is_annotated,
        "signed": made.is_signed,
        "dry_run": dry_run,
    }


def _delete(invocation: Invocation, store: "Store", dot: "DotRow", names: tuple[str, ...]) -> None:
    from dmsync.engine.tagging import delete_tags

    gone = delete_tags(store, dot, names, dry_run=invocation.dry_run)
    if invocation.as_json:
        deleted = [{"tag": info.name, "target": info.target.hex()} for info in gone]
        invocation.summary({"deleted": deleted, "dry_run": invocation.dry_run})
        return
    verb = "Would delete" if invocation.dry_run else "Deleted"
    for info in gone:
        invocation.talk(f"{verb} tag {info.name} (was {info.target.hex()})")


# --- listing -------------------------------------------------------------------------------------


def _list(
    invocation: Invocation,
    store: "Store",
    dot: "DotRow",
    patterns: tuple[str, ...],
    lines: int,
    contains: str | None,
) -> None:
    from dmsync.engine.tagging import list_tags

    found = list_tags(store, dot, patterns, contains)
    if invocation.as_json:
        invocation.document([_tag_fields(info) for info in found])
        return
    for info in found:
        for line in _tag_lines(info, lines, verbose=bool(invocation.verbose)):
            output.write_line(line)


def _tag_fields(info: "TagInfo") -> dict[str, object]:
    fields: dict[str, object] = {
        "name": info.name,
        "target": info.target.hex(),
        "commit": info.commit.hex(),
        "annotated": info.tag is not None,
        "signed": info.is_signed,
    }
    return fields if info.tag is None else {**fields, **_annotation_fields(info.tag)}


def _tag_lines(info: "TagInfo", count: int, *, verbose: bool) -> Iterator[str]:
    name = output.escape_name(info.name)
    if verbose:
        name += f" {info.commit.hex()[: output.SHORT_ID_DIGITS]}"
    message = output.escape_text(info.tag.message).strip("\n").split("\n") if info.tag else []
    shown = message[:count]
    yield f"{name}  {shown[0]}" if shown else name
    for line in shown[1:]:
        yield f"    {line}".rstrip()


@dataclass(frozen=True)
class ShownTag:
    """An annotated tag as `dm show` prints it before its commit."""

    lines: tuple[str, ...]
    fields: dict[str, object]


def shown_tag(
    store: "Store", dot: "DotRow", text: str, signatures: SignatureReader | None
) -> ShownTag | None:
    """What `text` names, when that is an annotated tag; with its signature judged."""
    from dmsync.core.ids import Kind
    from dmsync.engine.tagging import find_signed
    from dmsync.engine.tags import read_tag

    kind, oid = find_signed(store, dot, text)
    if kind is not Kind.TAG:
        return None
    tag = read_tag(store, dot.dot, oid)
    lines = list(_annotation_lines(tag))
    fields: dict[str, object] = {"name": tag.name, "id": oid.hex(), **_annotation_fields(tag)}
    if signatures is not None:
        verdict = signatures.verdict(kind, oid)
        lines.insert(1, f"Signature: {verdict_text(verdict)}")
        fields["signature"] = verdict_fields(verdict)
    return ShownTag(tuple(lines), fields)


def _annotation_fields(tag: "Tag") -> dict[str, object]:
    return {
        "tagger": tag.tagger,
        "date": output.iso_date(tag.time_ns, tag.offset_minutes),
        "message": tag.message,
    }


def _annotation_lines(tag: "Tag") -> Iterator[str]:
    yield f"tag {output.escape_name(tag.name)}"
    yield f"Tagger: {output.escape_name(tag.tagger)}"
    yield f"Date: {output.human_date(tag.time_ns, tag.offset_minutes)}"
    yield ""
    for line in output.escape_text(tag.message).rstrip("\n").split("\n"):
        yield f"    {line}".rstrip()
    yield ""


# --- verifying -----------------------------------------------------------------------------------


@click.command(
    "verify",
    cls=DmCommand,
    epilog="Example: dm verify v1.0 master~20..master --allowed-signers ~/.ssh/allowed_signers",
)
@click.argument("revisions", metavar="[REV|A..B]...", nargs=-1, type=RANGE)
@click.option(
    "--allowed-signers",
    "signers",
    type=FILE_NAME,
    metavar="FILE",
    help="Whose signatures count, as ssh-keygen(1) describes it.",
)
@click.option("--raw", is_flag=True, help="Print the stored signatures and check nothing.")
@query_options
@click.pass_obj
def verify_command(
    invocation: Invocation, revisions: tuple[str, ...], signers: str | None, raw: bool
) -> None:
    """Check that allowed signers have signed commits (default HEAD) and annotated tags.

    Succeeds only if each one named, and every commit of a range A..B, has a good signature now.
    The allowed signers are those of --allowed-signers, else of allowed-signers under [user] in
    the configuration.

    Without dm, stock OpenSSH checks the same (for a tag write "dm tag" and its id from dm tag
    --json):

    \b
        dm verify --raw COMMIT > commit.sig
        printf 'dm commit %s\\n' COMMIT | ssh-keygen -Y verify -n dm \\
            -f ALLOWED_SIGNERS -I PRINCIPAL -s commit.sig
    """
    if raw:
        _print_raw(invocation, revisions or ("HEAD",))
    else:
        _verify(invocation, list(revisions or ("HEAD",)), signers)


def _print_raw(invocation: Invocation, revisions: tuple[str, ...]) -> None:
    found = []
    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        for text, kind, oid in _named(store, dot, revisions):
            armours = store.catalog.signatures(dot.dot, oid)
            if not armours:
                raise BadSignature(f"{text}: {kind.name.lower()} {oid.hex()} has no signature")
            for armour in armours:
                signature = armour.decode("ascii", "backslashreplace")
                found.append({"id": oid.hex(), "kind": kind.name.lower(), "signature": signature})
    if invocation.as_json:
        invocation.document(found)
        return
    for item in found:
        output.write_line(output.escape_text(item["signature"]).rstrip("\n"))


def _named(
    store: "Store", dot: "DotRow", revisions: tuple[str, ...] | list[str]
) -> "Iterator[tuple[str, Kind, ObjectId]]":
    """(as it was named, kind, id) of each commit and annotated tag to look at."""
    from dmsync.core.ids import Kind
    from dmsync.engine.history import log_commits
    from dmsync.engine.tagging import find_signed

    for text in revisions:
        if ".." in text:
            for info in log_commits(store, dot, text):
                yield text, Kind.COMMIT, info.id
        else:
            yield text, *find_signed(store, dot, text)


def _verify(invocation: Invocation, revisions: list[str], signers: str | None) -> None:
    allowed = allowed_signers(invocation, signers)
    if allowed is None:
        raise ConfigError(
            "no allowed signers: it is not known whose signatures count",
            hint="give --allowed-signers FILE, or set allowed-signers under [user]",
        )
    failed: list[tuple[str, Verdict]] = []
    results: list[dict[str, object]] = []
    with invocation.open_store() as store:
        dot = invocation.resolve_dot(store)
        reader = SignatureReader(store, dot.dot, allowed)
        for _, kind, oid in _named(store, dot, revisions):
            verdict = reader.verdict(kind, oid)
            what = f"{kind.name.lower()} {oid.hex()}"
            results.append({"kind": kind.name.lower(), "id": oid.hex(), **verdict_fields(verdict)})
            if verdict.standing != "good":
                failed.append((what, verdict))
            if not invocation.as_json:
                output.write_line(f"{what}: {verdict_text(verdict)}")
    if not results:
        raise UsageError(f"no commit is in {' '.join(revisions)}: nothing was verified")
    if invocation.as_json:
        invocation.document(results)
    if failed:
        raise _not_good(failed, len(results))


def _not_good(failed: "list[tuple[str, Verdict]]", count: int) -> BadSignature:
    what, verdict = failed[0]
    more = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
    return BadSignature(
        f"{what} has no good signature: {verdict.reason}{more} (of {count})",
        failed=[name.partition(" ")[2] for name, _ in failed[:100]],
        count=len(failed),
    )
