"""Progress: what the counts say, how it is shown where, and that it is out of the way of others."""

import io
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dmsync.engine.progress import SILENT
from dmsync.engine.progress import Progress as Port
from dmsync.storage import stages
from dmsync.surfaces.cli import progress as progress_module
from dmsync.surfaces.cli.invocation import Invocation
from dmsync.surfaces.cli.progress import (
    COLUMNS_UNKNOWN,
    INTERVAL_S_MIN,
    JsonProgress,
    LineProgress,
    Progress,
    ShownProgress,
    TerminalProgress,
    fitting_line,
    make_progress,
)
from tests.support.processes import wait_until

MIB = 1024**2
NEVER_S = 1e6
PARTS = {
    "title": "committing app:",
    "phase": "reading",
    "share": "45%",
    "amount": "1.20 GiB of 2.60 GiB",
    "rate": "310.00 MiB/s",
    "items": "120 of 310 items",
    "time": "12s left",
}


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], float]:
    """Time that passes only when it is told to; gives the time it is then."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def tick(seconds: float = 0.0) -> float:
        now[0] += seconds
        return now[0]

    return tick


@pytest.fixture(autouse=True)
def _nothing_measured() -> Iterator[None]:
    yield
    stages.stop()


class Terminal(io.StringIO):
    """A stderr that says it is a terminal; `descriptor` is that of a real one, if any."""

    descriptor = -1

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor


@pytest.fixture
def on_terminal(monkeypatch: pytest.MonkeyPatch) -> Callable[[], Terminal]:
    """From the call on stderr is a terminal. (In a fixture's setup pytest would take it back.)"""

    def make() -> Terminal:
        written = Terminal()
        monkeypatch.setattr(sys, "stderr", written)
        return written

    return make


@pytest.fixture
def invocation(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Invocation:
    for variable in [name for name in os.environ if name.startswith(("DM_", "XDG_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TERM", "xterm")
    return Invocation()


# --- what the counts say -----------------------------------------------------------------------


def test_the_display_is_what_the_engine_reports_to() -> None:
    ports: list[Port] = [SILENT, Progress("working")]
    for port in ports:
        port.phase("reading", bytes_total=1, items_total=1)
        port.reached(1, 1)


def test_the_share_is_of_the_bytes_or_else_of_the_items(clock) -> None:
    progress = Progress("working")
    assert progress.share_done() is None
    progress.phase("reading", bytes_total=200, items_total=10)
    progress.reached(50, 9)
    assert progress.share_done() == 0.25
    progress.reached(300, 9)  # files may grow while they are read
    assert progress.share_done() == 1.0
    progress.phase("sending", items_total=10)
    progress.reached(12345, 9)
    assert progress.share_done() == 0.9
    progress.phase("sending", bytes_total=0, items_total=0)
    assert progress.share_done() is None


def test_the_time_left_follows_the_pace_of_the_phase(clock) -> None:
    progress = Progress("working")
    progress.phase("scanning")
    clock(100)
    progress.phase("reading", bytes_total=400)
    progress.reached(100)
    assert progress.eta_s(clock(0.5)) is None, "too early to tell"
    assert progress.eta_s(clock(4.5)) == 15
    progress.reached(0)
    assert progress.eta_s(clock()) is None
    assert progress.elapsed_s(clock()) == 105


def test_the_rate_is_that_of_the_last_seconds_so_that_a_stall_shows(clock) -> None:
    progress = Progress("working")
    progress.phase("sending")
    for second in range(1, 31):
        progress.reached(second * 100)
        assert progress.rate(clock(1)) == 100
    rates = [progress.rate(clock(1)) for _ in range(20)]
    assert rates == sorted(rates, reverse=True)
    assert rates[0] > 0
    assert rates[-1] == 0
    progress.phase("checking")
    assert progress.rate(clock()) == 0


# --- lines -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (
            200,
            "committing app: reading 45% 1.20 GiB of 2.60 GiB 310.00 MiB/s 120 of 310 items 12s left",
        ),
        (79, "committing app: reading 45% 1.20 GiB of 2.60 GiB 310.00 MiB/s 12s left"),
        (60, "reading 45% 1.20 GiB of 2.60 GiB 310.00 MiB/s 12s left"),
        (39, "reading 45% 310.00 MiB/s 12s left"),
        (20, "reading 45% 12s left"),
        (19, "45% 12s left"),
        (11, "45%"),
        (2, "45"),
        (0, ""),
        (-1, ""),
    ],
)
def test_the_least_telling_parts_go_first_in_a_narrow_terminal(width: int, line: str) -> None:
    assert fitting_line(PARTS, width) == line
    assert len(line) <= max(0, width)


def test_a_line_never_holds_what_a_terminal_obeys(on_terminal, clock) -> None:
    terminal = on_terminal()
    progress = TerminalProgress("committing \x1b[2Japp\n", delay_s=NEVER_S, interval_s=NEVER_S)
    progress.phase("reading")
    progress.draw(clock(1))
    assert terminal.getvalue().count("\x1b") == 1
    assert "\\x1b[2Japp\\n" in terminal.getvalue()


def test_the_line_is_written_over_and_taken_away(on_terminal, clock) -> None:
    terminal = on_terminal()
    progress = TerminalProgress("committing app", delay_s=NEVER_S, interval_s=NEVER_S)
    with progress:
        progress.phase("reading", bytes_total=4 * MIB, items_total=2)
        progress.reached(MIB, 1)
        progress.draw(clock(2))
        drawn = terminal.getvalue()
        assert (
            drawn
            == (
                "\r\x1b[Kcommitting app: reading 25% 1.00 MiB of 4.00 MiB 512.00 kiB/s "
                "1 of 2 items 6s left"
            )[: len("\r\x1b[K") + COLUMNS_UNKNOWN - 1]
            or "6s left" in drawn
        )
        with progress.aside():
            assert terminal.getvalue() == drawn + "\r\x1b[K"
            terminal.write("a remark\n")
        progress.draw(clock(1))
    assert terminal.getvalue().endswith("left\r\x1b[K")
    assert all(len(line) < COLUMNS_UNKNOWN for line in terminal.getvalue().split("\r\x1b[K"))


def test_the_line_fits_the_terminal_as_it_is_at_the_moment(on_terminal, clock, monkeypatch) -> None:
    terminal = on_terminal()
    columns = [200]
    monkeypatch.setattr(os, "get_terminal_size", lambda fd: os.terminal_size((columns[0], 24)))
    progress = TerminalProgress("committing app", delay_s=NEVER_S, interval_s=NEVER_S)
    progress.phase("reading", bytes_total=4 * MIB, items_total=2)
    progress.reached(MIB, 1)
    widths = []
    for width in (200, 80, 20, 5, 1, 0):
        columns[0] = width
        terminal.truncate(terminal.seek(0))
        progress.draw(clock(2))
        widths.append(len(terminal.getvalue()) - len("\r\x1b[K"))
    assert widths[0] > 80 > widths[1] > 20 > widths[2] > 5 > widths[3] > 0 == widths[4]
    assert 20 < widths[5] < COLUMNS_UNKNOWN, "a terminal that does not know its size"


def test_lines_for_logs_have_phase_bytes_rate_and_time_left(capsys, clock) -> None:
    progress = LineProgress("pushing", delay_s=NEVER_S, interval_s=NEVER_S)
    clock(60)
    progress.phase("sending", bytes_total=40 * MIB, items_total=8)
    progress.reached(10 * MIB, 2)
    progress.draw(clock(5))
    assert capsys.readouterr().err == (
        "pushing: sending 25%, 10.00 MiB of 40.00 MiB, 2.00 MiB/s, 2 of 8 items, 15s left, "
        "1m05s so far\n"
    )


def test_json_lines_have_the_same_and_the_stages(capsys, clock) -> None:
    progress = JsonProgress("pushing", delay_s=NEVER_S, interval_s=NEVER_S)
    stages.start().add("send", 1.5)
    progress.phase("sending", bytes_total=40, items_total=8)
    progress.reached(10, 2)
    progress.draw(clock(5))
    assert json.loads(capsys.readouterr().out) == {
        "type": "progress",
        "title": "pushing",
        "phase": "sending",
        "bytes_done": 10,
        "bytes_total": 40,
        "items_done": 2,
        "items_total": 8,
        "bytes_per_s": 2,
        "eta_s": 15.0,
        "elapsed_s": 5.0,
        "stages": {"send": {"seconds": 1.5, "calls": 1}},
    }


# --- when it is shown --------------------------------------------------------------------------


class Counting(ShownProgress):
    """Notes when it was drawn, and in which phase."""

    def __init__(self, delay_s: float, interval_s: float, *, each_phase: bool = False) -> None:
        super().__init__("work", delay_s=delay_s, interval_s=interval_s, each_phase=each_phase)
        self.drawn: list[tuple[str, int]] = []
        self.is_broken = False

    def draw(self, now_s: float) -> None:
        self.drawn.append((self.phase_name, self.bytes_done))
        if self.is_broken:
            raise BrokenPipeError


def test_quick_work_draws_nothing() -> None:
    with Counting(NEVER_S, NEVER_S) as progress:
        progress.phase("reading")
        progress.reached(1)
        progress.phase("writing")
    assert isinstance(progress, Counting)
    assert progress.drawn == []


def test_long_work_is_drawn_without_its_doing_from_when_it_has_begun() -> None:
    with Counting(INTERVAL_S_MIN, INTERVAL_S_MIN) as progress:
        assert isinstance(progress, Counting)
        assert not threading.Event().wait(3 * INTERVAL_S_MIN)
        assert progress.drawn == []
        progress.reached(7)
        wait_until(lambda: len(progress.drawn) >= 3, what="three looks")
    drawn = len(progress.drawn)
    assert not threading.Event().wait(3 * INTERVAL_S_MIN)
    assert len(progress.drawn) == drawn, "nothing after the end"


def test_no_pace_is_faster_than_ten_a_second() -> None:
    progress = Counting(0.0, 0.001)
    assert (
        (progress._delay_s, progress._interval_s) == (INTERVAL_S_MIN, INTERVAL_S_MIN) == (0.1, 0.1)
    )


def test_each_phase_ends_with_its_last_counts_where_that_is_wanted() -> None:
    with Counting(NEVER_S, NEVER_S, each_phase=True) as progress:
        assert isinstance(progress, Counting)
        progress.phase("scanning")
        progress.reached(3)
        progress.phase("reading")
        progress.reached(4)
        progress.close()
    assert progress.drawn == [("scanning", 3), ("reading", 4)]


def test_work_that_fails_ends_without_a_last_word() -> None:
    progress = Counting(NEVER_S, NEVER_S, each_phase=True)
    with pytest.raises(KeyboardInterrupt), progress:
        progress.phase("reading")
        raise KeyboardInterrupt
    assert progress.drawn == []


def test_an_output_that_is_gone_does_not_end_the_work() -> None:
    progress = Counting(NEVER_S, NEVER_S, each_phase=True)
    progress.is_broken = True
    with progress:
        progress.phase("reading")
        progress.phase("writing")
        progress.phase("checking")
    assert progress.drawn == [("reading", 0)]


def test_a_terminal_that_takes_nothing_does_not_hold_up_the_end(monkeypatch) -> None:
    monkeypatch.setattr(progress_module, "_CLOSE_WAIT_S", 0.05)
    stuck, released = threading.Event(), threading.Event()

    class Stuck(Counting):
        def draw(self, now_s: float) -> None:
            stuck.set()
            released.wait(20)

    with Stuck(0, 0) as progress:
        progress.reached(1)
        assert stuck.wait(20)
    released.set()


def test_counts_may_come_from_any_thread() -> None:
    with Counting(0, 0) as progress:
        assert isinstance(progress, Counting)

        def work() -> None:
            for count in range(20_000):
                progress.reached(count, count)

        workers = [threading.Thread(target=work) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        wait_until(lambda: progress.drawn, what="a look")
    assert progress.bytes_done == 19_999


def test_sizes_are_added_up_by_the_display_when_the_work_is_long() -> None:
    asked = threading.Event()

    def sizes() -> Iterator[int]:
        assert threading.current_thread() is not threading.main_thread()
        asked.set()
        yield from (300, 0, 100)

    with Counting(NEVER_S, NEVER_S) as progress:
        progress.phase("writing", sizes=sizes())
    assert not asked.is_set(), "quick work: nobody looked"
    with Counting(0, 0) as progress:
        progress.phase("writing", sizes=sizes())
        wait_until(lambda: progress.bytes_total, what="the totals")
        assert (progress.bytes_total, progress.items_total) == (400, 3)
        progress.phase("syncing")
        assert (progress.bytes_total, progress.items_total) == (None, None)


def test_sizes_that_cannot_be_found_or_are_no_longer_wanted_are_left() -> None:
    waiting, go_on = threading.Event(), threading.Event()

    def broken() -> Iterator[int]:
        yield 1
        waiting.set()
        raise KeyError

    def endless() -> Iterator[int]:
        waiting.set()
        while True:
            yield 1

    def late() -> Iterator[int]:
        waiting.set()
        assert go_on.wait(20)
        yield 7

    with Counting(0, 0) as progress:
        assert isinstance(progress, Counting)
        progress.phase("writing", sizes=broken())
        assert waiting.wait(20)
        waiting.clear()
        progress.phase("writing", sizes=late())
        assert waiting.wait(20)
        waiting.clear()
        progress.phase("syncing")
        go_on.set()
        drawn = len(progress.drawn)
        wait_until(lambda: len(progress.drawn) > drawn + 1, what="further looks")
        assert progress.bytes_total is None, "those of the phase before"
        progress.phase("writing", sizes=endless())
        assert waiting.wait(20)
    assert not progress._thread.is_alive()


# --- which display -----------------------------------------------------------------------------


def test_a_terminal_gets_a_line_a_log_one_a_minute(invocation, on_terminal, monkeypatch) -> None:
    on_terminal()
    shown = make_progress("x", invocation, is_query=False)
    assert isinstance(shown, TerminalProgress)
    assert (shown._delay_s, shown._interval_s) == (2.0, 0.2)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    shown = make_progress("x", invocation, is_query=False)
    assert type(shown) is LineProgress
    assert (shown._delay_s, shown._interval_s, shown._each_phase) == (60, 60, False)
    invocation.shows_progress = True
    shown = make_progress("x", invocation, is_query=False)
    assert type(shown) is LineProgress
    assert (shown._delay_s, shown._interval_s, shown._each_phase) == (1, 1, True)


@pytest.mark.parametrize("term", ["dumb", None])
def test_a_dumb_terminal_gets_lines(invocation, on_terminal, monkeypatch, term: str | None) -> None:
    on_terminal()
    if term is None:
        monkeypatch.delenv("TERM")
    else:
        monkeypatch.setenv("TERM", term)
    assert type(make_progress("x", invocation, is_query=False)) is LineProgress


def test_json_and_the_log_of_very_verbose_runs_get_lines(invocation, on_terminal) -> None:
    on_terminal()
    invocation.verbose = 2
    assert type(make_progress("x", invocation, is_query=False)) is LineProgress
    invocation.as_json = True
    shown = make_progress("x", invocation, is_query=False)
    assert isinstance(shown, JsonProgress)
    assert (shown._interval_s, shown._each_phase) == (1, False)


@pytest.mark.parametrize("as_json", [False, True])
def test_nothing_is_shown_to_who_wants_nothing(
    invocation, on_terminal, monkeypatch, as_json: bool
) -> None:
    on_terminal()
    invocation.as_json = as_json
    invocation.shows_progress = False
    assert type(make_progress("x", invocation, is_query=False)) is Progress
    invocation.shows_progress = True
    assert type(make_progress("x", invocation, is_query=False)) is not Progress
    invocation.quiet = True
    assert type(make_progress("x", invocation, is_query=False)) is Progress


def test_the_environment_sets_the_pace_and_the_option_wins(
    invocation, on_terminal, monkeypatch
) -> None:
    on_terminal()
    monkeypatch.setenv("DM_PROGRESS_FPS", "4")
    shown = make_progress("x", invocation, is_query=False)
    assert isinstance(shown, TerminalProgress)
    assert shown._interval_s == 0.25
    monkeypatch.setenv("DM_PROGRESS_FPS", "0")
    silent = Invocation()
    assert type(make_progress("x", silent, is_query=False)) is Progress
    silent.shows_progress = True
    assert isinstance(make_progress("x", silent, is_query=False), TerminalProgress)


# --- among other output ------------------------------------------------------------------------


def test_remarks_results_and_questions_do_not_mix_with_the_line(
    invocation, on_terminal, monkeypatch, capsys
) -> None:
    terminal = on_terminal()
    monkeypatch.setattr(sys, "stdin", io.StringIO("Y\n"))
    with invocation.progress("committing app") as progress:
        assert isinstance(progress, TerminalProgress)
        progress.phase("reading")
        progress.draw(time.monotonic())
        invocation.talk("a remark")
        progress.draw(time.monotonic())
        invocation.warn("a warning")
        progress.draw(time.monotonic())
        assert invocation.ask("sure?")
        progress.draw(time.monotonic())
        invocation.result("the result")
        assert terminal.getvalue().endswith("\r\x1b[K")
    for said in ("a remark\n", "dm: warning: a warning\n", "sure?"):
        assert f"\r\x1b[K{said}\r\x1b[K" in terminal.getvalue()


def test_the_summary_is_the_last_line_and_says_where_the_time_went(invocation, capsys) -> None:
    invocation.as_json = invocation.shows_progress = True
    with invocation.progress("undoing") as progress:
        progress.phase("writing")
        with stages.stage("place"):
            progress.reached(5, 1)
        invocation.summary({"commit": "x"})
    first, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert (first["type"], first["phase"], first["bytes_done"]) == ("progress", "writing", 5)
    assert (last["type"], last["commit"]) == ("summary", "x")
    assert last["stages"]["place"]["calls"] == 1


def test_a_document_stands_alone_on_stdout(invocation, capsys) -> None:
    invocation.as_json = True
    with invocation.progress("comparing", is_query=True) as progress:
        assert type(progress) is Progress
    invocation.shows_progress = True
    with invocation.progress("comparing", is_query=True) as progress:
        progress.phase("scanning")
    told = capsys.readouterr()
    assert told.out == ""
    assert json.loads(told.err)["phase"] == "scanning"


def test_a_quick_change_has_no_stages(invocation, capsys) -> None:
    invocation.as_json = True
    invocation.summary({"name": "x"})
    assert json.loads(capsys.readouterr().out) == {"type": "summary", "name": "x"}
