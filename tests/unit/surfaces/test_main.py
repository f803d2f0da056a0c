import ast
import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import click
import pytest

from dmsync import __version__, errors
from dmsync.errors import DmError
from dmsync.surfaces.cli import main as main_module
from dmsync.surfaces.cli.invocation import DmCommand, Invocation, changing_options
from dmsync.surfaces.cli.main import COMMANDS, dm, main

NAMES = [name for section in COMMANDS.values() for name in section]


def every_command() -> list[tuple[tuple[str, ...], click.Command]]:
    context = click.Context(dm)
    found: list[tuple[tuple[str, ...], click.Command]] = []
    for name in NAMES:
        command = dm.get_command(context, name)
        assert command is not None
        if isinstance(command, click.Group):
            found += [((name, below), command.commands[below]) for below in command.commands]
        if not isinstance(command, click.Group) or command.invoke_without_command:
            found.append(((name,), command))
    return found


@pytest.fixture(autouse=True)
def _away_from_the_users_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in [name for name in os.environ if name.startswith(("DM_", "XDG_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("DM_HOME", str(tmp_path / "store"))
    monkeypatch.setattr(main_module, "install_handlers", lambda: None)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException], None]:
    """Make `dm version` raise."""

    def install(error: BaseException) -> None:
        def raise_it(*_: object, **__: object) -> None:
            raise error

        command = import_module("dmsync.surfaces.cli.about").version_command
        monkeypatch.setattr(command, "callback", raise_it)

    return install


# --- parsing ----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path for path, _ in every_command()])
def test_every_command_has_help_with_an_example(
    path: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*path, "--help"]) == 0
    told = capsys.readouterr()
    assert "Example: " in told.out
    assert told.err == ""


@pytest.mark.parametrize(("path", "command"), every_command())
def test_every_command_takes_the_common_options(
    path: tuple[str, ...], command: click.Command
) -> None:
    given = {option for p in command.params for option in p.opts}
    assert {"--json", "-q", "-v", "--lock-wait", "--yes", "--dot", "--home"} <= given


def test_the_listed_help_is_that_of_the_commands() -> None:
    context = click.Context(dm)
    for section in COMMANDS.values():
        for name, (_, about) in section.items():
            command = dm.get_command(context, name)
            assert command is not None and command.help, name
            assert len(about) < 70, name


@pytest.mark.parametrize(
    "arguments",
    [
        ["--json", "-v", "--lock-wait", "2", "--dot", "d", "probe"],
        ["probe", "--json", "-v", "--lock-wait", "2", "--dot", "d"],
        ["--json", "--lock-wait", "7", "probe", "--lock-wait", "2", "-v", "--dot", "d"],
    ],
)
def test_common_options_stand_before_or_after_the_command(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Invocation] = []

    @click.command("probe", cls=DmCommand)
    @changing_options
    @click.pass_obj
    def probe(invocation: Invocation) -> None:
        seen.append(invocation)

    monkeypatch.setattr(dm, "get_command", lambda ctx, name: probe)
    assert main(arguments) == 0
    (invocation,) = seen
    assert invocation.as_json
    assert (invocation.verbose, invocation.lock_wait_s, invocation.default_dot) == (1, 2.0, "d")
    assert not invocation.quiet


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["version", "--nonsense"],
        ["version", "--lock-wait", "x"],
        ["version", "--lock-wait", "-1"],
        ["completion", "tcsh"],
        ["log", "-n", "-3"],
        ["dot", "set-upstream", "only-one"],
        ["diff", "a", "b", "c"],
        ["commit"],
        ["commit", "-m", "x", "-d", "novalue"],
        ["init", "bad name"],
        ["init", "d", "--as-root"],
        ["init", "d", "--at", "/nonexistent/x"],
        ["help", "nonsense"],
    ],
)
def test_wrong_use_is_exit_code_2_and_one_json_error(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("dm: error: ")
    assert main([*arguments, "--json"]) == 2
    told = capsys.readouterr()
    error = json.loads(told.err)
    assert error["type"] == "error"
    assert error["exit_code"] == 2
    assert error["message"]
    assert isinstance(error["hint"], str)


def test_a_misspelt_command_is_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["comit"]) == 2
    assert "did you mean dm commit?" in capsys.readouterr().err


def test_no_command_shows_the_help_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "Usage: dm" in capsys.readouterr().err


def test_dotmesh_texts_of_metadata(capsys: pytest.CaptureFixture[str]) -> None:
    main(["commit", "-m", "x", "-d", "novalue"])
    assert "Each metadata value must be a name=value pair: novalue" in capsys.readouterr().err
    main(["commit", "-m", "x", "-d", "Upper=1"])
    assert (
        "Metadata field names must start with lowercase characters: Upper"
        in capsys.readouterr().err
    )
    main(["commit"])
    assert "Please provide a commit message" in capsys.readouterr().err


def test_metadata_keeps_everything_after_the_first_equals_sign() -> None:
    from dmsync.surfaces.cli.commit import metadata_pairs

    assert metadata_pairs(("url=a=b,c",)) == (("url", "a=b,c"),)


# --- what went wrong ----------------------------------------------------------------------------


def all_errors() -> list[type[DmError]]:
    return [
        value
        for value in vars(errors).values()
        if isinstance(value, type) and issubclass(value, DmError)
    ]


@pytest.mark.parametrize("error_type", all_errors())
def test_every_error_gives_its_exit_code_text_and_json(
    error_type: type[DmError],
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(error_type("it \x1b[2Jbroke", hint="try this", tip=b"\xab", count=3))
    assert main(["version"]) == error_type.exit_code
    told = capsys.readouterr()
    assert told.err == "dm: error: it \\x1b[2Jbroke\ndm: hint: try this\n"
    assert main(["--json", "version"]) == error_type.exit_code
    error = json.loads(capsys.readouterr().err)
    assert error["code"] == error_type.code
    assert error["exit_code"] == error_type.exit_code
    assert error["retryable"] is error_type.retryable
    assert (error["message"], error["hint"]) == ("it \x1b[2Jbroke", "try this")
    assert error["facts"] == {"tip": "ab", "count": 3}


def test_a_bug_is_exit_code_1_one_line_and_a_private_log(
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "format").write_text("{}")
    failing(ZeroDivisionError("surprise\nsecond line"))
    for _ in range(2):
        assert main(["version"]) == 1
    told = capsys.readouterr()
    assert "Traceback" not in told.err
    assert told.err.count("dm: error: unexpected ZeroDivisionError: surprise\n") == 2
    log = store / "crash.log"
    assert str(log) in told.err
    assert log.read_text().count("Traceback") == 2
    assert log.stat().st_mode & 0o777 == 0o600


def test_a_bug_without_a_store_makes_none(
    failing: Callable[[BaseException], None],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    failing(ZeroDivisionError("surprise"))
    assert main(["--json", "version"]) == 1
    error = json.loads(capsys.readouterr().err)
    log = Path(error["log"])
    assert error["code"] == "bug"
    assert log.stat().st_mode & 0o777 == 0o600
    assert not (tmp_path / "store").exists()
    log.unlink()


def test_ctrl_c_is_exit_code_130(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(KeyboardInterrupt())
    assert main(["--json", "version"]) == 130
    assert json.loads(capsys.readouterr().err)["code"] == "interrupted"


# --- as a process ---------------------------------------------------------------------------------


def test_a_damaged_filesystem_is_no_bug(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(OSError(errno.EUCLEAN, "Structure needs cleaning", "/srv/store/dots"))
    assert main(["--json", "version"]) == 1
    error = json.loads(capsys.readouterr().err)
    assert error["code"] == "storage" and "/srv/store/dots" in error["message"]


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )


def test_version_prints_client_and_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dmsync", "version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"Client:\n\tVersion: {__version__}\n"
    done = subprocess.run(
        [sys.executable, "-m", "dmsync", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"dm {__version__}\n"


def test_version_loads_no_slow_module() -> None:
    slow = [
        "asyncio", "asyncssh", "rich", "sqlite_utils", "sqlite3", "logging", "importlib.metadata",
        "dataclasses", "subprocess", "tempfile", "backports.zstd", "zstandard",
        "blake3", "msgpack", "pyfastcdc", "numpy", "email", "http", "ssl", "socket",
    ]  # fmt: skip
    code = (
        "import sys\nfrom dmsync.surfaces.cli.main import main\n"
        f"assert main(['version']) == 0\nprint([m for m in {slow!r} if m in sys.modules])"
    )
    assert run_python(code).stdout.splitlines()[-1] == "[]"


def test_completions_of_every_shell_are_printed_and_complete_commands() -> None:
    for shell in ("bash", "zsh", "fish"):
        done = subprocess.run(
            [sys.executable, "-m", "dmsync", "completion", shell],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert "_DM_COMPLETE" in done.stdout
    done = subprocess.run(
        [sys.executable, "-m", "dmsync"],
        env={**os.environ, "_DM_COMPLETE": "bash_complete", "COMP_WORDS": "dm ch", "COMP_CWORD": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert "checkout" in done.stdout


def test_output_that_cannot_be_written_is_told_plainly(tmp_path: Path) -> None:
    environment = {**os.environ, "DM_HOME": str(tmp_path / "store")}
    command = [sys.executable, "-m", "dmsync", "init", "app", "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment
        )
    error = json.loads(done.stderr)
    assert (done.returncode, error["code"]) == (1, "storage")
    assert "No space left" in error["message"]
    closed = subprocess.run(
        ["bash", "-c", '"$@" >&- 2>&-', "bash", *command[:-2], "other"], env=environment
    )
    assert closed.returncode == 0


def test_a_reader_that_leaves_is_no_error() -> None:
    code = (
        "import sys, os\nfrom dmsync.surfaces.cli import main as m\n"
        "read, write = os.pipe(); os.close(read); os.dup2(write, 1)\n"
        "sys.exit(m.main(['--help']))"
    )
    done = run_python(code)
    assert done.returncode == 141
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)]
)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_signal_runs_what_must_be_undone(
    number: signal.Signals, code: int, asynchronous: bool
) -> None:
    wait = "run_async(asyncio.sleep(30))" if asynchronous else "time.sleep(30)"
    script = (
        "import asyncio, sys, time\nfrom dmsync.surfaces.cli import main as m\n"
        "from dmsync.surfaces.cli.interrupts import run_async\n"
        "def work(given, invocation):\n"
        "    try:\n        print('ready', flush=True)\n"
        f"        {wait}\n"
        "    finally:\n        print('undone', flush=True)\n"
        "m._run = work\nsys.exit(m.main(['version']))"
    )
    # A test run under nohup ignores SIGHUP, and a child inherits that.
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(number)
    out, err = process.communicate(timeout=20)
    assert process.returncode == code
    assert out == "undone\n"
    assert "Traceback" not in err


def test_names_that_the_locale_cannot_show_are_escaped() -> None:
    code = "from dmsync.surfaces.cli import main as m\nm._make_streams_safe()\nprint('größe')"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PATH": os.environ["PATH"], "PYTHONIOENCODING": "ascii"},
        capture_output=True, text=True, cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.stdout == "gr\\xf6\\xdfe\n"


def test_bytes_that_got_past_every_check_are_no_bug(
    failing: Callable[[BaseException], None], capsys: pytest.CaptureFixture[str]
) -> None:
    failing(UnicodeEncodeError("utf-8", "caf\udce9", 3, 4, "surrogates not allowed"))
    assert main(["version"]) == 2
    assert capsys.readouterr().err.startswith("dm: error: not UTF-8 text: caf\\xe9")


# --- the source ----------------------------------------------------------------------------------


def test_only_surfaces_read_the_environment() -> None:
    package = Path(__file__).parents[3] / "dmsync"
    readers = [
        path.relative_to(package).as_posix()
        for path in package.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb")
    ]
    assert all(path.startswith("surfaces/") for path in readers), readers
