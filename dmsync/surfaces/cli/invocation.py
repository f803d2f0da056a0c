"""One run of `dm`: the options every command takes, before or after its name, and their effect.

Commands get an Invocation and ask it for the settings, the store and the output; nothing else
passes between the top of the command and its commands.
"""

import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click
from click.core import ParameterSource

from dmsync.errors import UsageError
from dmsync.storage import stages
from dmsync.surfaces.cli import output

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from dmsync.engine.settings import EngineSettings, Holding
    from dmsync.engine.store import Store
    from dmsync.storage.catalog import DotRow
    from dmsync.surfaces.cli.progress import Progress
    from dmsync.surfaces.settings import Settings

Command = TypeVar("Command", bound=Callable[..., Any])


class Invocation:
    """What the global options said, and what follows from them."""

    def __init__(self) -> None:
        self.as_json = False
        self.quiet = False
        self.verbose = 0
        self.assume_yes = False
        self.dry_run = False
        self.profile = False
        self.shows_progress: bool | None = None
        """--progress, --no-progress, or neither."""
        self.lock_wait_s: float | None = None
        self.default_dot: str | None = None
        self.home: str | None = None
        self.config: str | None = None
        self.accept_host_key: str | None = None
        self.accept_rewind = False
        self.limit_rate: int | None = None
        self.at_op: int | None = None
        self._settings: Settings | None = None
        self._progress: Progress | None = None

    @property
    def settings(self) -> "Settings":
        """Flags over environment over configuration files over defaults, read once."""
        if self._settings is None:
            from dmsync.surfaces.settings import load_settings

            self._settings = load_settings(
                os.environ,
                home=self.home,
                config=self.config,
                dot=self.default_dot,
                lock_wait_s=self.lock_wait_s,
            )
        return self._settings

    def open_store(self, *, create: bool = False, holding: "Holding | None" = None) -> "Store":
        """The store this run works on; with --at-op as it was then. `holding` as of
        EngineSettings, None: as the command needs.

        Raises:
            StoreNotFound without `create`. UsageError: the command asks nothing about the past.
        """
        from dataclasses import replace

        from dmsync.engine.store import Store

        settings = replace(self.settings.engine, say=self.warn, holding=holding or self._holding())
        if self.at_op is not None:
            return self._open_past(settings)
        return Store.open(self.settings.home, settings, create=create)

    @staticmethod
    def _holding() -> "Holding":
        """Queries do not wait for gc: a command that changes something has a dry run."""
        parameters = click.get_current_context().command.params
        return "wait" if any(found.name == "dry_run" for found in parameters) else "try"

    def _open_past(self, settings: "EngineSettings") -> "Store":
        from dmsync.engine.past import PastStore

        assert self.at_op is not None
        command = click.get_current_context().command_path.partition(" ")[2]
        if command not in _ABOUT_THE_PAST:
            raise UsageError(
                f"dm {command} does not take --at-op: it changes the store, or is about the "
                "present",
                hint=f"--at-op goes with {', '.join(sorted(_ABOUT_THE_PAST))}",
            )
        return PastStore(self.settings.home, settings, self.at_op)

    def resolve_dot(self, store: "Store", name: str | None = None) -> "DotRow":
        """The dot named on the line, else by --dot or DM_DOT, else the current one."""
        from dmsync.engine.dot_lookup import resolve_dot

        return resolve_dot(store, self.settings.dot if name is None else name)

    @contextmanager
    def progress(self, title: str, *, is_query: bool = False) -> "Iterator[Progress]":
        """A progress display fit for where stderr goes; silent with -q. With --json the stages of
        long work are measured. `is_query`: the answer is a single document."""
        from dmsync.surfaces.cli.progress import make_progress

        if self.as_json:
            stages.start()
        with make_progress(title, self, is_query=is_query) as progress:
            self._progress = progress
            try:
                yield progress
            finally:
                self._progress = None

    # --- output -------------------------------------------------------------------------------

    def document(self, value: object) -> None:
        """A query's answer with --json."""
        output.write_json(value)

    def summary(self, value: dict[str, object]) -> None:
        """The last JSON line of a command that worked; a dry run's says that it was one, that of
        long work where the time went."""
        if self._progress is not None:
            self._progress.close()
        dry_run = {"dry_run": True} if self.dry_run else {}
        output.write_json_line({"type": "summary", **value, **dry_run, **self.stages()})

    def stages(self) -> dict[str, object]:
        """The JSON field `stages`, where they are measured."""
        clock = stages.running()
        if clock is None:
            return {}
        from dmsync.surfaces.cli.profile import stages_fields

        return {"stages": stages_fields(clock)}

    def end_profile(self) -> None:
        """The run is over, however it ended: tell where the time went, if that was asked for."""
        clock = stages.running()
        stages.stop()
        if clock is not None and self.profile:
            from dmsync.surfaces.cli.profile import print_profile

            print_profile(clock, as_json=self.as_json)

    def result(self, text: str) -> None:
        """What a changing command prints on success; -q keeps it back."""
        if not self.quiet:
            with self.aside():
                output.write_line(text)

    def talk(self, text: str) -> None:
        """A remark for a human, on stderr; never with -q, JSON with --json."""
        if not self.quiet:
            self._to_stderr("note", text)

    def warn(self, text: str) -> None:
        """Something the user must know although the command goes on."""
        self._to_stderr("warning", text)

    def _to_stderr(self, kind: str, text: str) -> None:
        with self.aside():
            if self.as_json:
                output.write_line(output.json_text({"type": kind, "message": text}), sys.stderr)
            else:
                prefix = "dm: warning: " if kind == "warning" else ""
                output.write_line(prefix + output.escape_line(text), sys.stderr)

    def aside(self) -> "AbstractContextManager[None]":
        """Keeps what shows the progress of the work out of the way."""
        return nullcontext() if self._progress is None else self._progress.aside()

    def confirm(self, question: str) -> bool:
        """Ask, unless --yes; exactly `Y` agrees. Never asks without a terminal.

        Raises:
            UsageError: there is nobody to ask.
        """
        if self.assume_yes:
            return True
        if not (sys.stdin is not None and sys.stdin.isatty()):
            raise UsageError(
                "this asks for confirmation and there is no terminal", hint="give --yes"
            )
        return self.ask(question)

    def ask(self, question: str) -> bool:
        """Put a question to whoever is at the terminal; exactly `Y` agrees."""
        with self.aside():
            sys.stderr.write(question)
            sys.stderr.flush()
            return sys.stdin.readline().rstrip("\n") == "Y"


_ABOUT_THE_PAST: Final = frozenset(
    {"log", "blame", "branch", "show", "ls", "cat", "diff", "list", "tag", "reflog", "op log"}
)
"""Commands that --at-op goes with; where they can also change something, the store refuses."""


# --- commands and their options -----------------------------------------------------


class FileName(click.types.StringParamType):
    """A path, or what holds one: bytes that are no UTF-8 are welcome (surrogateescape)."""


FILE_NAME = FileName()


def refuse_undecodable(context: click.Context, parameter: click.Parameter, value: object) -> None:
    """Refuse bytes that are no UTF-8 where text is expected: what is stored is Unicode.

    Raises:
        UsageError: naming the argument.
    """
    if isinstance(parameter.type, FileName):
        return
    for text in value if isinstance(value, tuple) else (value,):
        if isinstance(text, str) and not is_unicode(text):
            what = parameter.get_error_hint(context)
            raise UsageError(f"{what} is not UTF-8 text: {output.escape_name(text)}")


def is_unicode(text: str) -> bool:
    """False for text that holds bytes which could not be decoded."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


class DmCommand(click.Command):
    """A command whose help shows its own options before those that all commands share, and whose
    texts are Unicode."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        rest = super().parse_args(ctx, args)
        for parameter in () if ctx.resilient_parsing else self.get_params(ctx):
            refuse_undecodable(ctx, parameter, ctx.params.get(parameter.name or ""))
        return rest

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        write_options(self, ctx, formatter)


def write_options(
    command: click.Command, context: click.Context, formatter: click.HelpFormatter
) -> None:
    """The options of a command's help, in two sections."""
    own: list[tuple[str, str]] = []
    shared: list[tuple[str, str]] = []
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if isinstance(parameter, click.Option) and record is not None:
            (shared if _is_shared(parameter) else own).append(record)
    for title, records in (("Options", own), ("Common options", shared)):
        if records:
            with formatter.section(title):
                formatter.write_dl(records)


def _is_shared(parameter: click.Parameter) -> bool:
    is_special = parameter.name in ("accept_host_key", "accept_rewind", "limit_rate")
    return (not is_special and not parameter.expose_value) or parameter.name == "help"


def _record(context: click.Context, parameter: click.Parameter, value: object) -> None:
    """Keep an option that was given; its default never overrides one given before the command."""
    name = parameter.name
    invocation = context.obj
    if name is None or not isinstance(invocation, Invocation):
        return
    if context.get_parameter_source(name) is not ParameterSource.DEFAULT:
        refuse_undecodable(context, parameter, value)
        if name == "verbose" and isinstance(value, int):
            value += invocation.verbose
        if name == "profile":
            stages.start()
        setattr(invocation, name, value)


def _complete_dot(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> "list[CompletionItem]":
    from dmsync.surfaces.cli.completions import DOT  # which needs this module

    return DOT.shell_complete(context, parameter, incomplete)


def _option(*declarations: str, **attributes: Any) -> Callable[[Command], Command]:
    return click.option(*declarations, expose_value=False, callback=_record, **attributes)


def _lock_wait(context: click.Context, parameter: click.Parameter, value: float | None) -> None:
    if value is not None and not 0 <= value <= 86400:
        raise click.BadParameter("seconds from 0 to 86400")
    _record(context, parameter, value)


_COMMON = (
    _option("--json", "as_json", is_flag=True, help="Print JSON; errors too, on stderr."),
    _option("-q", "--quiet", "quiet", is_flag=True, help="Print nothing but errors and answers."),
    _option("-v", "--verbose", "verbose", count=True, help="Say more; twice: log to stderr."),
    _option(
        "--dot",
        "default_dot",
        metavar="DOT",
        shell_complete=_complete_dot,
        help="Work on DOT instead of the current dot.",
    ),
    _option("--home", "home", type=FILE_NAME, metavar="DIR", help="The store, instead of DM_HOME."),
    _option(
        "--config",
        "config",
        type=FILE_NAME,
        metavar="FILE",
        help="Configuration, instead of DM_CONFIG.",
    ),
    click.option(
        "--lock-wait",
        "lock_wait_s",
        type=float,
        metavar="SECONDS",
        expose_value=False,
        callback=_lock_wait,
        help="How long to wait for another dm (default 10).",
    ),
    _option(
        "--at-op",
        "at_op",
        type=click.IntRange(1),
        metavar="SEQ",
        help="Ask about the store as it was after operation SEQ (dm op log).",
    ),
    _option(
        "--progress/--no-progress",
        "shows_progress",
        default=None,
        help="Show how far long work is, without a terminal too; or never.",
    ),
    _option(
        "--profile", "profile", is_flag=True, help="Say at the end, on stderr, where the time went."
    ),
)
_CHANGING = (
    _option("-n", "--dry-run", "dry_run", is_flag=True, help="Say what would be done, do nothing."),
    _option("-y", "--yes", "assume_yes", is_flag=True, help="Answer yes to every question."),
)


_RATE_UNITS: Final = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
_RATE_MAX: Final = 1 << 40


def _rate(text: str) -> int:
    """Bytes a second: a number with k, M or G behind it, or none. Raises BadParameter."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kKMG]?)", text)
    rate = 0 if found is None else int(float(found[1]) * _RATE_UNITS[found[2].upper()])
    if not 0 < rate <= _RATE_MAX:
        raise click.BadParameter("a rate is bytes a second, such as 500k or 20M")
    return rate


def _apply(command: Command, options: tuple[Callable[[Command], Command], ...]) -> Command:
    for option in reversed(options):
        command = option(command)
    return command


def query_options(command: Command) -> Command:
    """Options of a command that changes nothing (--yes is accepted and has no effect)."""
    return _apply(
        command,
        (*_COMMON, _option("--yes", "assume_yes", is_flag=True, hidden=True)),
    )


def changing_options(command: Command) -> Command:
    """Options of a command that changes something."""
    return _apply(command, (*_COMMON, *_CHANGING))


def reaching_options(command: Command) -> Command:
    """Options of a command that may meet a host for the first time."""
    return _apply(
        command,
        (
            _option(
                "--accept-host-key",
                "accept_host_key",
                metavar="SHA256:...",
                help="Trust an unknown host that shows this key.",
            ),
        ),
    )


def transfer_options(command: Command) -> Command:
    """Options of a command that moves data to or from another host."""
    limit = _option(
        "--limit-rate",
        "limit_rate",
        type=_rate,
        metavar="RATE",
        help="Bytes a second in each direction at most: 500k, 20M (powers of 1024).",
    )
    rewind = _option(
        "--accept-rewind",
        "accept_rewind",
        is_flag=True,
        help="Go on with a remote that was put back to an older state.",
    )
    return reaching_options(_apply(command, (limit, rewind)))
