"""Jobs in forked processes: results in order, whatever becomes of the processes."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from dmsync.engine import worker_processes
from dmsync.engine.worker_processes import WorkerProcesses
from dmsync.storage.stages import measured, stage

JOBS = 40


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(JOBS)))
    fd = os.open(path, os.O_RDONLY)
    yield fd
    os.close(fd)


def byte_and_process(fds: Sequence[int], offset: int) -> tuple[int, int]:
    with stage("read"):
        time.sleep(0.001 * (offset % 3))  # later jobs are done before earlier ones
        return os.pread(fds[0], 1, offset)[0], os.getpid()


def on(fd: int, jobs: Iterable[int]) -> Iterator[tuple[list[int], int]]:
    return (([fd], job) for job in jobs)


def no_children() -> bool:
    try:
        os.waitpid(-1, os.WNOHANG)
    except ChildProcessError:
        return True
    return False


def test_results_come_in_the_order_of_the_jobs_and_from_all_processes(file: int) -> None:
    with WorkerProcesses(byte_and_process, 3) as processes:
        for _ in range(2):
            done = list(processes.map(on(file, range(JOBS)), lambda *_: (-1, os.getpid())))
            assert [byte for byte, _ in done] == list(range(JOBS))
            assert len({process for _, process in done} - {os.getpid()}) == 3
    assert no_children()


def test_large_results_do_not_block_the_handing_out(file: int) -> None:
    with WorkerProcesses(lambda _, job: bytes([job]) * 5_000_000, 2) as processes:
        done = processes.map(on(file, range(12)), lambda *_: b"")
        assert [result == bytes([job]) * 5_000_000 for job, result in enumerate(done)] == [
            True
        ] * 12


def test_what_a_process_cannot_do_is_done_here_and_its_error_raised(file: int) -> None:
    def work(fds: Sequence[int], offset: int) -> str:
        if offset % 4 == 0:
            raise OSError("not here")
        return "there"

    with WorkerProcesses(work, 2) as processes:
        done = list(processes.map(on(file, range(12)), lambda *_: "here"))
        assert done == ["here", "there", "there", "there"] * 3

        def fails(_: object, offset: int) -> str:
            raise ValueError(offset)

        results = processes.map(on(file, range(1, 12)), fails)
        assert [next(results) for _ in range(3)] == ["there"] * 3
        with pytest.raises(ValueError, match=r"^4$"):
            next(results)
        assert list(processes.map(on(file, [1, 2]), fails)) == ["there"] * 2
    assert no_children()


@pytest.mark.parametrize("killed", [1, 2])
def test_jobs_of_killed_processes_are_done_here(file: int, killed: int) -> None:
    def work(fds: Sequence[int], offset: int) -> str:
        if offset in (5, 9)[:killed]:
            os.kill(os.getpid(), signal.SIGKILL)
        return "there"

    with WorkerProcesses(work, 2) as processes:
        done = list(processes.map(on(file, range(JOBS)), lambda *_: "here"))
        assert len(done) == JOBS
        assert done[5] == "here"
        assert ("there" in done[20:]) == (killed == 1)
        assert next(iter(processes.map(on(file, range(3)), lambda *_: "here"))) == (
            "there" if killed == 1 else "here"
        )
    assert no_children()


def test_a_process_that_hangs_is_given_up(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def work(fds: Sequence[int], offset: int) -> str:
        if offset == 2:
            time.sleep(1000)
        return "there"

    monkeypatch.setattr(worker_processes, "PATIENCE_S", 0.3)
    with WorkerProcesses(work, 1) as processes:
        done = list(processes.map(on(file, range(6)), lambda *_: "here"))
    assert done == ["there", "there", "here", "here", "here", "here"]
    assert no_children()


def test_a_process_that_stops_in_the_middle_of_its_answer_is_given_up(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calling, send = os.getpid(), worker_processes._send

    def send_half(to: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
        if os.getpid() == calling:
            send(to, data, fds)
            return
        to.sendall(len(data).to_bytes(8, "big") + data[:5])
        os.kill(os.getpid(), signal.SIGSTOP)

    monkeypatch.setattr(worker_processes, "_send", send_half)
    monkeypatch.setattr(worker_processes, "PATIENCE_S", 0.3)
    with WorkerProcesses(byte_and_process, 2) as processes:
        assert list(processes.map(on(file, range(5)), lambda *_: (-1, 0))) == [(-1, 0)] * 5
    assert no_children()


def test_giving_up_early_ends_what_is_in_work(file: int) -> None:
    with WorkerProcesses(lambda *_: time.sleep(1000), 2) as processes:
        results = processes.map(on(file, range(JOBS)), lambda *_: None)
        with pytest.raises(KeyboardInterrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            before = signal.signal(signal.SIGALRM, signal.default_int_handler)
            try:
                next(results)
            finally:
                signal.signal(signal.SIGALRM, before)
        assert no_children()
        assert list(processes.map(on(file, [7]), lambda _, job: job)) == [7]


def test_a_job_too_large_to_hand_out_is_done_here(file: int) -> None:
    with WorkerProcesses(lambda _, job: os.getpid(), 2) as processes:
        jobs = [b"small", bytes(5_000_000), b"small"]
        done = list(processes.map((([file], job) for job in jobs), lambda *_: 0))
        assert [process == 0 for process in done] == [False, True, False]
        assert processes.jobs_left_undone == 1


def test_ignored_ends_of_children_do_no_harm(file: int) -> None:
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # as a supervisor may hand it down
    try:
        with WorkerProcesses(byte_and_process, 2) as processes:
            assert len(list(processes.map(on(file, range(JOBS)), lambda *_: (-1, 0)))) == JOBS
            assert processes.jobs_left_undone == 0
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_handlers_of_the_calling_process_do_not_run_in_others(file: int) -> None:
    """Unwinding there what belongs to the calling process would undo its work."""

    def interrupted(*_: object) -> None:
        raise AssertionError("the calling process's")

    before = [signal.signal(number, interrupted) for number in (signal.SIGTERM, signal.SIGHUP)]
    try:
        with WorkerProcesses(
            lambda *_: [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGHUP)], 1
        ) as processes:
            (found,) = processes.map([([file], 0)], lambda *_: [])
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGHUP, before[1])
    assert found == [signal.SIG_DFL, signal.SIG_DFL]
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == set()


def test_without_processes_everything_is_done_here(file: int) -> None:
    with WorkerProcesses(byte_and_process, 0) as processes:
        assert list(processes.map(on(file, range(3)), lambda _, job: (job, 0))) == [
            (0, 0),
            (1, 0),
            (2, 0),
        ]


def test_their_stages_count_as_ours(file: int) -> None:
    with measured() as clock, WorkerProcesses(byte_and_process, 2) as processes:
        list(processes.map(on(file, range(JOBS)), lambda *_: (-1, 0)))
    assert clock.times()["read"].seconds > 0.001 * JOBS / 2


def test_they_end_with_the_calling_process(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent("""
        import os, time
        from dmsync.engine.worker_processes import WorkerProcesses

        def work(fds, job):
            os.write(1, b"%d\\n" % os.getpid())
            time.sleep(1000)

        fd = os.open(os.devnull, os.O_RDONLY)
        list(WorkerProcesses(work, 2).map([([fd], 0), ([fd], 1)], None))
        """)
    )
    calling = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True)
    assert calling.stdout is not None
    processes = [int(calling.stdout.readline()) for _ in range(2)]
    calling.kill()
    calling.wait()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{process}").exists() for process in processes):
        assert time.monotonic() < deadline, "they live on"
        time.sleep(0.01)
    calling.stdout.close()
