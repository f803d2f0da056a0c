"""The command `dm`: finds the command's module, runs it, turns what happened into an exit code.

Start-up is part of the contract (`dm version` within five bare interpreters): nothing here or in
a query's path imports asyncio, asyncssh, rich, sqlite_utils or logging before it is needed.
"""

import errno
import os
import sys
from collections.abc import Sequence
from typing import Final

import click
from click.exceptions import Exit, NoArgsIsHelpError

from dmsync import __version__
from dmsync.errors import DmError, StorageFailed, UsageError
from dmsync.surfaces.cli.entry import INTERRUPTED_EXIT
from dmsync.surfaces.cli.interrupts import Terminated, install_handlers
from dmsync.surfaces.cli.invocation import Invocation, changing_options
from dmsync.surfaces.cli.output import escape_line, json_text, write_line

BROKEN_PIPE_EXIT: Final = 141
"""What a shell reports for a program ended by SIGPIPE, as `dm log | head` expects."""
_OUTPUT_ERRORS: Final = frozenset((errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT))
_DISK_ERRORS: Final = frozenset((errno.EIO, errno.EUCLEAN, errno.EBADMSG, errno.EREMOTEIO))
"""What a filesystem answers that cannot read what it wrote; wherever it may be met."""
_PACKAGE: Final = "dmsync.surfaces.cli."

COMMANDS: Final[dict[str, dict[str, tuple[str, str]]]] = {
    "Dots": {
        "init": ("dots", "Make a new dot and make it current."),
        "switch": ("dots", "Choose the current dot."),
        "list": ("dots", "List the dots."),
        "dot": ("dot", "Show, rename, delete a dot; find its directory."),
    },
    "Working tree and history": {
        "status": ("working", "Show uncommitted changes."),
        "diff": ("working", "Show what differs between commits or from the working tree."),
        "commit": ("commit", "Record the state of the whole dot."),
        "log": ("log", "Show the commits, oldest first."),
        "show": ("contents", "Show one commit and what it changed."),
        "ls": ("contents", "List a directory of a commit."),
        "cat": ("contents", "Print a file of a commit."),
        "blame": ("log", "Show which commit last changed each path."),
        "restore": ("restore", "Bring single paths back from a commit."),
        "export": ("restore", "Write a commit's tree into a directory or a tar file."),
    },
    "Branches and merging": {
        "branch": ("branches", "List, make, delete or rename branches."),
        "checkout": ("branches", "Switch to another branch."),
        "reset": ("branches", "Move the current branch to another commit."),
        "merge": ("merge", "Join another branch's changes into the current one."),
        "conflicts": ("merge", "List what a merge could not decide."),
        "resolve": ("merge", "Decide a conflict."),
        "cherry-pick": ("transplant", "Apply what one commit changed."),
        "revert": ("transplant", "Take back what one commit changed."),
        "stash": ("stash", "Put uncommitted changes away and bring them back."),
        "tag": ("tag", "List, make, delete or verify tags."),
        "verify": ("tag", "Check the signatures of commits and tags."),
    },
    "Undo": {
        "undo": ("undo", "Take back what the last commands did."),
        "redo": ("undo", "Take back an undo."),
        "reflog": ("operations", "Show where a branch has been."),
        "op": ("operations", "Show the store's operations; go back to one."),
    },
    "Other clusters": {
        "remote": ("remote", "Manage the clusters this one exchanges commits with."),
        "push": ("exchange", "Send a branch and the commits it needs."),
        "pull": ("exchange", "Fetch a branch and fast-forward it."),
        "fetch": ("exchange", "Fetch commits without changing local branches."),
        "clone": ("exchange", "Copy a dot from a remote."),
        "transfer": ("transfer", "Show running and past transfers."),
        "bundle": ("bundle", "Carry commits in a file."),
        "serve": ("serve", "Let other clusters push to and pull from this store."),
        "collaborator": ("collaborator", "Say who else may read and write a dot on a server."),
        "quota": ("quota", "Bound what the dots of a namespace may take on this store."),
    },
    "The store": {
        "prune": ("prune", "Thin out old commits by rules."),
        "gc": ("gc", "Free the space of what nothing needs."),
        "df": ("df", "Show what takes space, and why."),
        "fsck": ("fsck", "Check that everything stored is complete and unharmed."),
        "version": ("about", "Show the version of this dm and of a remote's."),
        "completion": ("about", "Print the completion script of a shell."),
        "help": ("about", "Show the help of a command."),
    },
}


class LazyGroup(click.Group):
    """Commands named in COMMANDS; each one's module is imported when it is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [name for section in COMMANDS.values() for name in section]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        for section in COMMANDS.values():
            if cmd_name in section:
                from importlib import import_module

                module = import_module(_PACKAGE + section[cmd_name][0])
                command: click.Command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
                return command
        return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        command = self.get_command(ctx, name)
        if command is None and not ctx.resilient_parsing:
            raise UsageError(f"no such command: {name}", hint=_nearest(name, self, ctx))
        return (name if command else None), command, args[1:]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        for title, section in COMMANDS.items():
            with formatter.section(title):
                formatter.write_dl([(name, about) for name, (_, about) in section.items()])


def _nearest(name: str, group: click.Group, context: click.Context) -> str:
    from difflib import get_close_matches

    close = get_close_matches(name, group.list_commands(context), n=1)
    return f"did you mean dm {close[0]}?" if close else "dm --help lists the commands"


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Example: dm init app --at /srv/app && dm commit -m first && dm push backup. "
    "Options common to all commands may stand before or after the command.",
)
@changing_options
@click.version_option(__version__, "--version", message="dm %(version)s")
def dm() -> None:
    """Git for live data: commit, branch, push and pull whole data directories over SSH."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line; returns its exit code. Never raises but for bugs in reporting."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _make_streams_safe()
    sys.unraisablehook = _log_unraisable
    if "_DM_COMPLETE" in os.environ:
        dm.main(list(given), prog_name="dm", obj=Invocation())
    install_handlers()
    invocation = Invocation()
    try:
        return _run_reported(given, invocation)
    finally:
        invocation.end_profile()


def _run_reported(given: list[str], invocation: Invocation) -> int:
    try:
        code = _run(given, invocation)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except DmError as error:
        return _report(error, given)
    except click.ClickException as error:
        return _report_usage(error, given)
    except (KeyboardInterrupt, click.Abort):
        return _report_end("interrupted", INTERRUPTED_EXIT, given)
    except Terminated as ended:
        return _report_end("terminated", ended.exit_code, given)
    except BrokenPipeError:
        # The reader has gone; without this the interpreter complains when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE_EXIT
    except OSError as error:
        if error.errno in _DISK_ERRORS and error.filename is not None:
            return _report(_disk_failed(error), given)
        if error.filename is not None or error.errno not in _OUTPUT_ERRORS:
            return _report_unexpected(error, given, invocation)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _report(_output_failed(error), given)
    except UnicodeEncodeError as error:
        return _report(_not_unicode(error), given)
    except Exception as bug:  # noqa: BLE001 - the one place where every failure ends
        return _report_unexpected(bug, given, invocation)


def _run(given: list[str], invocation: Invocation) -> int:
    try:
        with dm.make_context("dm", list(given), obj=invocation) as context:
            if invocation.verbose > 1:
                _log_to_stderr()
            result = dm.invoke(context)
    except NoArgsIsHelpError as error:
        write_line(error.format_message(), sys.stderr)
        return UsageError.exit_code
    except Exit as done:
        return done.exit_code
    return result if isinstance(result, int) else 0


def _make_streams_safe() -> None:
    """Text that the terminal's encoding lacks is escaped instead of ending the command; a stream
    that was closed (`>&-`) is no reason to fail, either."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - for as long as we run
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _log_unraisable(failure: "sys.UnraisableHookArgs") -> None:
    """What a finaliser raises changes nothing any more: no text for users."""
    import logging

    logging.getLogger("dmsync").debug("in a finaliser", exc_info=failure.exc_value)


def _log_to_stderr() -> None:
    import logging

    class OneLine(logging.Formatter):
        """Libraries log what peers say as it came."""

        def format(self, record: logging.LogRecord) -> str:
            return escape_line(super().format(record))

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(relativeCreated)d %(name)s %(message)s"))
    logging.basicConfig(level=logging.DEBUG, handlers=[handler])


# --- reporting -----------------------------------------------------


def _wants_json(given: list[str]) -> bool:
    """Whether errors are JSON: known even when the line itself could not be parsed."""
    options = given[: given.index("--")] if "--" in given else given
    return "--json" in options


def print_error(error: DmError, *, as_json: bool, subject: str = "") -> None:
    """One expected failure on stderr; `subject` says of what, where there are several."""
    fields: dict[str, object] = {
        "code": error.code,
        "exit_code": error.exit_code,
        "retryable": error.retryable,
    }
    if error.facts:
        fields["facts"] = error.facts
    if subject:
        fields["dot"] = subject
    message = f"{subject}: {error.message}" if subject and not as_json else error.message
    _print_error(message, error.hint, fields, as_json=as_json)


def _print_error(message: str, hint: str, fields: dict[str, object], *, as_json: bool) -> None:
    if as_json:
        line = json_text({"type": "error", "message": message, "hint": hint, **fields})
        write_line(line, sys.stderr)
        return
    write_line(f"dm: error: {escape_line(message)}", sys.stderr)
    if hint:
        write_line(f"dm: hint: {escape_line(hint)}", sys.stderr)


def _report(error: DmError, given: list[str]) -> int:
    print_error(error, as_json=_wants_json(given))
    return error.exit_code


def _output_failed(error: OSError) -> StorageFailed:
    """What the command did is done; only telling it failed."""
    return StorageFailed(
        f"cannot write the output: {error.strerror}",
        hint="what the command changed stays; dm op log shows it",
    )


def _disk_failed(error: OSError) -> StorageFailed:
    """The filesystem is damaged, or what it lies on."""
    return StorageFailed(
        f"cannot read {os.fsdecode(error.filename)}: {error.strerror}",
        hint="the disk or its filesystem is damaged: check it (fsck), then run dm fsck --full",
        errno=error.errno or 0,
    )


def _not_unicode(error: UnicodeEncodeError) -> UsageError:
    """The last resort for bytes of the command line or environment that got past the checks."""
    return UsageError(f"not UTF-8 text: {error.object}")


def _report_usage(error: click.ClickException, given: list[str]) -> int:
    context = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "dm"
    message = error.format_message().rstrip(".")
    fields: dict[str, object] = {"code": UsageError.code, "exit_code": UsageError.exit_code}
    fields["retryable"] = False
    _print_error(message, f"see {path} --help", fields, as_json=_wants_json(given))
    return UsageError.exit_code


def _report_end(what: str, exit_code: int, given: list[str]) -> int:
    fields: dict[str, object] = {"code": "interrupted", "exit_code": exit_code, "retryable": True}
    _print_error(what, "", fields, as_json=_wants_json(given))
    return exit_code


def _report_unexpected(failure: Exception, given: list[str], invocation: Invocation) -> int:
    from dmsync.surfaces.cli.machine_refusals import machine_refusal

    refusal = machine_refusal(failure)
    if refusal is not None:
        return _report(refusal, given)
    return _report_bug(failure, given, invocation)


def _report_bug(bug: Exception, given: list[str], invocation: Invocation) -> int:
    from dmsync.surfaces.cli.crash_log import write_crash_log

    message = f"unexpected {type(bug).__name__}: {bug}".split("\n", 1)[0]
    path = write_crash_log(bug, given, invocation.home)
    _print_error(
        message,
        f"this is a bug in dm; the details are in {path}" if path else "this is a bug in dm",
        {"code": "bug", "exit_code": DmError.exit_code, "retryable": False, "log": path},
        as_json=_wants_json(given),
    )
    return DmError.exit_code
