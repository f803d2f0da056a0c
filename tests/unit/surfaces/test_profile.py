"""--profile: where the time went, on stderr, whatever became of the command."""

import io
import json
import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest

from dmsync.errors import DmError
from dmsync.storage import stages
from dmsync.storage.stages import StageClock, stage
from dmsync.surfaces.cli import main as main_module
from dmsync.surfaces.cli.interrupts import Terminated
from dmsync.surfaces.cli.main import main
from dmsync.surfaces.cli.profile import print_profile, stages_fields


@pytest.fixture(autouse=True)
def _away_from_the_users_store(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for variable in [name for name in os.environ if name.startswith(("DM_", "XDG_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(main_module, "install_handlers", lambda: None)


@pytest.fixture
def working(monkeypatch: pytest.MonkeyPatch) -> Callable[[BaseException | None], None]:
    """Make `dm version` work for two stages, and then raise."""

    def install(error: BaseException | None) -> None:
        def work(*_: object, **__: object) -> None:
            with stage("scan"), stage("read"):
                if error is not None:
                    raise error

        command = import_module("dmsync.surfaces.cli.about").version_command
        monkeypatch.setattr(command, "callback", work)

    return install


def clock_of(elapsed_s: float, **seconds: float) -> StageClock:
    clock = StageClock()
    for name in stages.STAGE_NAMES:
        if name in seconds:
            clock.add(name, seconds[name])
    clock.elapsed_s = lambda: elapsed_s  # type: ignore[method-assign]
    return clock


def test_the_table_has_seconds_share_and_calls(capsys) -> None:
    clock = clock_of(10, hash=1.5, scan=0.25)
    clock.add("hash", 1)
    print_profile(clock, as_json=False)
    told = capsys.readouterr()
    assert told.out == ""
    *lines, cpu = told.err.splitlines()
    assert lines == [
        "stage  seconds  share  calls",
        "scan     0.250     2%  1",
        "hash     2.500    25%  2",
        "other    7.250    72%",
        "total   10.000   100%",
    ]
    assert cpu.startswith("CPU ")


def test_stages_of_several_threads_may_come_to_more_than_the_time(capsys) -> None:
    print_profile(clock_of(1, hash=1.5, read=0.75), as_json=False)
    told = capsys.readouterr().err
    assert "hash     1.500   150%  1" in told
    assert "other" not in told


class Gone(io.StringIO):
    """A stream whose reader has gone."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_nobody_to_read_it_is_no_failure(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", Gone())
    for as_json in (False, True):
        print_profile(clock_of(1), as_json=as_json)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (None, 0),
        (DmError("it failed"), 1),
        (KeyboardInterrupt(), 130),
        (Terminated(15), 143),
        (ValueError("a bug"), 1),
    ],
)
@pytest.mark.parametrize("arguments", [["--profile", "version"], ["version", "--profile"]])
def test_it_is_told_at_the_end_however_the_command_ends(
    working, capsys, error: BaseException | None, code: int, arguments: list[str]
) -> None:
    working(error)
    assert main(arguments) == code
    lines = capsys.readouterr().err.splitlines()
    start = lines.index("stage  seconds  share  calls")
    assert [line.split()[0] for line in lines[start:]] == [
        "stage", "scan", "read", "other", "total", "CPU",
    ]  # fmt: skip
    assert (start > 0) == (error is not None), "the error comes first"
    assert stages.running() is None


def test_with_json_it_is_the_last_line_on_stderr(working, capsys) -> None:
    working(DmError("it failed"))
    assert main(["version", "--profile", "--json"]) == 1
    error, profile = map(json.loads, capsys.readouterr().err.splitlines())
    assert error["type"] == "error"
    assert profile["type"] == "profile"
    assert profile["stages"]["read"]["calls"] == 1
    assert profile["elapsed_s"] >= profile["stages"]["read"]["seconds"] >= 0
    assert profile["user_s"] > 0 <= profile["system_s"]


def test_who_does_not_ask_is_told_nothing(working, capsys) -> None:
    working(None)
    assert main(["version"]) == 0
    assert capsys.readouterr().err == ""
    assert stages.running() is None


def test_the_fields_of_json_results() -> None:
    assert stages_fields(clock_of(3, send=0.1234567)) == {"send": {"seconds": 0.123457, "calls": 1}}
