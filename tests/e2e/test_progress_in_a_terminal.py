"""What somebody at a real terminal sees while long work goes on, and what is left when it ends."""

import os
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from tests.support.cluster import Cluster
from tests.support.terminal import Terminal

MIB = 1024**2
DATA_MIB = 512
COLUMNS = 100
DRAWN = re.compile(r"(committing|pushing|restoring|resetting|exporting)[^\r\n]*: \w+")
RATE = r"\d+\.\d\d [MG]iB/s"
ETA = r"\d+s left"
CTRL_C = b"\x03"
LINES_A_SECOND_MAX = 10
INTERRUPTED = 130


@pytest.fixture
def here(tmp_path: Path) -> Iterator[Cluster]:
    """A dot of some 500 MB that are not committed yet."""
    with Cluster(tmp_path / "here", "here") as cluster:
        data = tmp_path / "data"
        data.mkdir()
        source = random.Random(4)
        for number in range(DATA_MIB // 8):
            (data / f"{number:03}.bin").write_bytes(source.randbytes(8 * MIB))
        cluster.run("init", "app", "--at", str(data))
        yield cluster


@pytest.fixture
def there(tmp_path: Path, here: Cluster) -> Cluster:
    """A store on the same machine that `backup` names."""
    cluster = Cluster(tmp_path / "there", "there")
    cluster.run("init", "--bare")
    here.run("remote", "add", "backup", str(cluster.home))
    return cluster


def at_terminal(
    cluster: Cluster,
    *arguments: str,
    columns: int = COLUMNS,
    environment: Mapping[str, str] | None = None,
) -> Terminal:
    return Terminal(
        [*cluster.program, *arguments],
        environment={**cluster.environment, "TERM": "xterm-256color", **(environment or {})},
        columns=columns,
    )


def assert_clean(terminal: Terminal, *left: str) -> None:
    """Nothing but these lines is on the screen, and the next prompt starts a line of its own."""
    assert len(terminal.screen()) == len(left) + 1, terminal.screen()
    for line, pattern in zip(terminal.screen(), (*left, ""), strict=True):
        assert re.fullmatch(pattern, line), terminal.screen()
    assert terminal.has_sane_modes()


def percentages(lines: Sequence[str]) -> list[int]:
    return [int(found) for line in lines for found in re.findall(r"(\d+)%", line)]


def test_a_commit_and_a_push_show_phases_rates_and_time_left(here: Cluster, there: Cluster) -> None:
    with at_terminal(here, "commit", "-m", "first") as terminal:
        began_s = time.monotonic()
        terminal.wait_for(rf"committing app: reading \d+% [^\r]* of {DATA_MIB}", slowly=True)
        terminal.wait_for(RATE, slowly=True)
        terminal.wait_for(ETA, slowly=True)
        assert terminal.end() == 0
        took_s = time.monotonic() - began_s
        assert_clean(terminal, "[0-9a-f]{64}")
        lines = terminal.lines_drawn()
        assert len(lines) <= LINES_A_SECOND_MAX * took_s + 1
        assert all(len(line) < COLUMNS for line in lines)
        reading = [line for line in lines if "reading" in line]
        assert percentages(reading) == sorted(percentages(reading))
    with at_terminal(here, "push", "backup") as terminal:
        terminal.wait_for(r"pushing: sending \d+%", slowly=True)
        terminal.wait_for(RATE, slowly=True)
        terminal.wait_for(ETA, slowly=True)
        assert terminal.end() == 0
        assert not DRAWN.search("\n".join(terminal.screen())), terminal.screen()
        assert terminal.has_sane_modes()


def test_a_narrow_terminal_and_one_that_is_resized_get_lines_that_fit(here: Cluster) -> None:
    with at_terminal(here, "commit", "-m", "first", columns=20) as terminal:
        terminal.wait_for(r"\d+% \d+s left", slowly=True)
        narrow = len(terminal.lines_drawn())
        terminal.resize(120)
        terminal.wait_for(f"committing app: reading [^\r]*{RATE}[^\r]*{ETA}", slowly=True)
        assert terminal.end() == 0
        assert_clean(terminal, "[0-9a-f]{64}")
        assert all(len(line) < 20 for line in terminal.lines_drawn()[:narrow])
        assert all(len(line) < 120 for line in terminal.lines_drawn())


def test_ctrl_c_leaves_the_terminal_clean_and_the_store_ready(here: Cluster) -> None:
    with at_terminal(here, "commit", "-m", "first") as terminal:
        terminal.wait_for(rf"committing app: reading [^\r]*{RATE}", slowly=True)
        terminal.press(CTRL_C)
        assert terminal.end() == INTERRUPTED
        assert_clean(terminal, r"(\^C)?dm: error: interrupted.*")
    here.run("commit", "-m", "again")
    assert here.run("fsck", "--full", "--json").summary()["ok"]


@pytest.mark.parametrize(
    ("options", "environment"),
    [
        (("-q",), {}),
        (("--no-progress",), {}),
        ((), {"TERM": "dumb"}),
        ((), {"DM_PROGRESS_FPS": "0"}),
    ],
)
def test_who_wants_none_or_has_a_dumb_terminal_gets_no_line(
    here: Cluster, options: tuple[str, ...], environment: dict[str, str]
) -> None:
    with at_terminal(here, "commit", "-m", "first", *options, environment=environment) as terminal:
        assert terminal.end() == 0
        assert_clean(terminal, *(() if "-q" in options else ("[0-9a-f]{64}",)))
        assert "\x1b" not in terminal.output


def test_no_color_gets_the_same_line_for_it_has_none(here: Cluster) -> None:
    with at_terminal(here, "commit", "-m", "first", environment={"NO_COLOR": "1"}) as terminal:
        terminal.wait_for("committing app: reading", slowly=True)
        assert terminal.end() == 0
        assert set(re.findall(r"\x1b[^A-Za-z]*[A-Za-z]", terminal.output)) == {"\x1b[K"}
        assert_clean(terminal, "[0-9a-f]{64}")


def test_without_a_terminal_lines_come_only_when_they_are_asked_for(
    here: Cluster, tmp_path: Path
) -> None:
    assert here.run("commit", "-m", "first").stderr == ""
    (tmp_path / "data" / "more.bin").write_bytes(os.urandom(MIB))
    told = here.run("commit", "-m", "second", "--progress").stderr.splitlines()
    assert [line for line in told if re.match(r"committing app: reading 100%, 1.00 MiB", line)], (
        told
    )
    assert here.run("commit", "-m", "third", "--progress", "-q").stderr == ""


def test_a_job_in_the_background_does_not_write_over_what_others_do(here: Cluster) -> None:
    """The shell that runs it is the foreground job; the commit goes on unseen."""
    script = f"set -m; {here.program[0]} commit -m first & wait; echo done"
    with Terminal(
        ["bash", "-c", script], environment={**here.environment, "TERM": "xterm"}
    ) as terminal:
        assert terminal.end() == 0
        assert not DRAWN.search(terminal.output), terminal.output
