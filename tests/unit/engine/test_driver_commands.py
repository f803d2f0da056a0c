"""Commands of diff and merge drivers: ended when they hang, bounded, their messages harmless."""

import os
import time
from pathlib import Path

import pytest

from dmsync.engine import driver_commands
from dmsync.engine.driver_commands import claims_path, failed, run_driver
from dmsync.engine.settings import DriverCommand
from dmsync.errors import DriverFailed


def driver(command: str, *patterns: str) -> DriverCommand:
    return DriverCommand("mine", command, patterns or ("*",))


def ends(pid: int) -> bool:
    """Whether that process is gone, or a zombie, within moments."""
    deadline = time.monotonic() + 10
    while is_running(pid):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_output_and_variables(tmp_path: Path) -> None:
    run = run_driver(
        driver('printf "%s|%s" "$DM_PATH" "$PWD"; cat; exit 3'),
        {"DM_PATH": b"a=b\n\xff'$x"},
        directory=str(tmp_path),
    )
    assert run.output == b"a=b\n\xff'$x|" + os.fsencode(tmp_path)
    assert (run.exit_status, run.is_truncated) == (3, False)


def test_a_command_that_hangs_is_ended_with_all_it_started(tmp_path: Path) -> None:
    hanging = driver(f"trap '' TERM; sleep 300 & echo $! > {tmp_path}/child; echo part; sleep 300")
    began = time.monotonic()
    with pytest.raises(DriverFailed, match=r"mine took more than 0\.3 s"):
        run_driver(hanging, {}, directory=str(tmp_path), timeout_s=0.3)
    assert time.monotonic() - began < 20
    assert ends(int((tmp_path / "child").read_text()))


def test_a_command_that_closes_its_output_and_hangs_is_ended(tmp_path: Path) -> None:
    with pytest.raises(DriverFailed, match="took more"):
        run_driver(driver("exec >&-; sleep 300"), {}, directory=str(tmp_path), timeout_s=0.3)


def test_what_runs_on_in_the_background_is_not_waited_for(tmp_path: Path) -> None:
    began = time.monotonic()
    run = run_driver(
        driver(f"sleep 300 & echo $! > {tmp_path}/child; echo done"), {}, directory=str(tmp_path)
    )
    assert run.output == b"done\n" and time.monotonic() - began < 20
    assert ends(int((tmp_path / "child").read_text()))


def test_endless_output_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(driver_commands, "OUTPUT_BYTES_MAX", 100_000)
    run = run_driver(driver("yes"), {}, directory=str(tmp_path))
    assert run.is_truncated and run.output == b"y\n" * 50_000


def test_the_error_of_a_failure_has_its_last_words_made_safe(tmp_path: Path) -> None:
    command = driver("printf 'first\\n\\033[31mred\\n' >&2; exit 4")
    run = run_driver(command, {}, directory=str(tmp_path))
    error = failed(command, run)
    assert str(error) == "the command of driver mine exited 4: first | ?[31mred"
    assert error.facts["exit_status"] == 4
    killed = run_driver(driver("kill -9 $$"), {}, directory=str(tmp_path))
    assert "killed by signal 9" in str(failed(command, killed))


def test_patterns_fit_paths_and_last_names() -> None:
    assert claims_path(driver("x", "*.json"), b"__default__/deep/a.json")
    assert claims_path(driver("x", "__default__/state/*"), b"__default__/state/a/b")
    assert claims_path(driver("x", "no", "Make[fF]ile"), b"__default__/Makefile")
    assert not claims_path(driver("x", "*.json"), b"__default__/a.JSON")
    assert claims_path(driver("x", "*"), b"\xff\n")
