"""Hooks: the application is quiet while the body runs, and let go whatever happens."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dmsync.engine.hooks import HookCommands, hook_environment, quiesced
from dmsync.errors import CaptureFailed, Interrupted

ENVIRONMENT = hook_environment(dot="shop", branch="master", tree="/srv/shop")


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + 10
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


def appends(log: Path, word: str) -> str:
    return f"echo {word} $DM_HOOK $DM_DOT $DM_BRANCH $DM_TREE >> '{log}'"


def test_pair_runs_around_the_body_with_the_promised_environment(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hooks = HookCommands(quiesce=appends(log, "q"), unquiesce=appends(log, "u"))
    with quiesced(hooks, ENVIRONMENT) as began, open(log, "a") as file:
        assert began <= time.monotonic()
        file.write("body\n")
    assert log.read_text().splitlines() == [
        "q quiesce shop master /srv/shop",
        "body",
        "u unquiesce shop master /srv/shop",
    ]


def test_no_hooks_do_nothing() -> None:
    assert not HookCommands()
    with quiesced(HookCommands(), ENVIRONMENT):
        pass


def test_failed_quiesce_tells_its_status_and_last_lines_and_is_undone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hooks = HookCommands(
        quiesce="for i in 1 2 3 4 5 6 7; do echo line$i >&2; done; printf '\\033[31mred\\n'; exit 7",
        unquiesce=appends(log, "u"),
    )
    with pytest.raises(CaptureFailed, match="exited 7") as caught:
        with quiesced(hooks, ENVIRONMENT):
            raise AssertionError("the body must not run")
    assert "line7" in caught.value.message and "line1 " not in caught.value.message
    assert "\x1b" not in caught.value.message
    assert log.exists()


def test_quiesce_that_hangs_is_killed_with_what_it_started(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    hooks = HookCommands(quiesce=f"sleep 1000 & echo $! > '{pid}'; wait", timeout_s=0.3)
    with pytest.raises(CaptureFailed, match=r"more than 0\.3 s"), quiesced(hooks, ENVIRONMENT):
        pass
    stat_path = Path(f"/proc/{int(pid.read_text())}/stat")
    assert not stat_path.exists() or stat_path.read_text().split()[2] in "ZX"


def test_error_in_the_body_is_the_one_told_and_the_pause_is_undone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hooks = HookCommands(unquiesce=appends(log, "u") + "; exit 1")
    with pytest.raises(KeyError), quiesced(hooks, ENVIRONMENT):
        raise KeyError("body")
    assert log.exists()


def test_failed_unquiesce_is_told() -> None:
    with pytest.raises(CaptureFailed, match="unquiesce hook exited 3"):
        with quiesced(HookCommands(unquiesce="exit 3"), ENVIRONMENT):
            pass


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_in_the_body_undoes_the_pause(tmp_path: Path, number: signal.Signals) -> None:
    log = tmp_path / "log"
    before = signal.getsignal(number)
    with pytest.raises(Interrupted), quiesced(HookCommands(unquiesce=appends(log, "u")), {}):
        os.kill(os.getpid(), number)
        time.sleep(5)
    assert log.exists() and signal.getsignal(number) is before


def test_signal_during_the_undoing_waits_for_it(tmp_path: Path) -> None:
    log = tmp_path / "log"
    hooks = HookCommands(unquiesce=f"sleep 0.4; {appends(log, 'u')}")
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted), quiesced(hooks, ENVIRONMENT):
        timer.start()
    assert log.exists()


# --- hold

HOLD = "touch '{0}'; echo preparing; echo ready; cat > /dev/null; rm '{0}'"


def test_hold_lasts_as_long_as_the_body(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with quiesced(HookCommands(hold=HOLD.format(lock)), ENVIRONMENT):
        assert lock.exists()
    assert not lock.exists()


def test_hold_is_let_go_when_the_body_fails(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    with pytest.raises(KeyError), quiesced(HookCommands(hold=HOLD.format(lock)), ENVIRONMENT):
        raise KeyError
    assert not lock.exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("echo no >&2; exit 4", "exited 4 before it was ready: no"),
        ("sleep 100", "was not ready within"),
        ("echo already; cat", "was not ready within"),
    ],
)
def test_hold_that_is_never_ready_fails(command: str, message: str) -> None:
    with pytest.raises(CaptureFailed, match=message):
        with quiesced(HookCommands(hold=command, timeout_s=0.3), ENVIRONMENT):
            raise AssertionError("the body must not run")


def test_hold_that_ends_too_early_makes_the_capture_worthless(tmp_path: Path) -> None:
    done = tmp_path / "done"
    command = f"echo ready; touch '{done}'; exit 0"
    with pytest.raises(CaptureFailed, match="let go before"):
        with quiesced(HookCommands(hold=command), ENVIRONMENT):
            wait_for(done)
            time.sleep(0.2)


def test_talkative_hold_does_not_block(tmp_path: Path) -> None:
    done = tmp_path / "done"
    command = f"echo ready; head -c 500000 /dev/zero; touch '{done}'; cat > /dev/null"
    with quiesced(HookCommands(hold=command), ENVIRONMENT):
        wait_for(done)


def test_hold_ends_when_dm_is_killed(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    held = tmp_path / "held"  # the lock is there before the hook says so to a dm that must live
    script = (
        "import pathlib, time\n"
        "from dmsync.engine.hooks import HookCommands, quiesced\n"
        f"with quiesced(HookCommands(hold={HOLD.format(lock)!r}), {{}}):\n"
        f"    pathlib.Path({str(held)!r}).touch()\n"
        "    time.sleep(100)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script])
    wait_for(held)
    assert lock.exists()
    process.kill()
    process.wait()
    deadline = time.monotonic() + 10
    while lock.exists():
        assert time.monotonic() < deadline, "the hook outlived its dm"
        time.sleep(0.01)


def test_sqlite_lock_is_held_while_the_tree_is_read(tmp_path: Path) -> None:
    import sqlite3

    path = tmp_path / "db"
    with sqlite3.connect(path) as database:
        database.execute("create table t(x)")
    database.close()
    script = (
        "import sqlite3, sys; d = sqlite3.connect(sys.argv[1], isolation_level=None); "
        "d.execute('begin immediate'); print('ready', flush=True); sys.stdin.read()"
    )
    with quiesced(HookCommands(hold=f"'{sys.executable}' -c \"{script}\" '{path}'"), {}):
        other = sqlite3.connect(path, timeout=0)
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("insert into t values (1)")
    other.execute("insert into t values (1)")
    other.close()
