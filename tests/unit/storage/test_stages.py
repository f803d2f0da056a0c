"""Stages add up, nest without counting twice, and cost nothing to those who do not measure."""

import asyncio
import threading
import time

import pytest

from dmsync.storage import stages
from dmsync.storage.stages import STAGE_NAMES, StageTime, measured, stage


@pytest.fixture
def clock(monkeypatch):
    """Time that passes only when it is told to; `tick(seconds)`."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def tick(seconds: float) -> None:
        now[0] += seconds

    return tick


def test_nothing_is_measured_until_it_is_asked_for() -> None:
    assert stages.running() is None
    first, second = stage("hash"), stage("write")
    assert first is second
    with first:
        pass
    with measured() as measuring:
        pass
    assert measuring.times() == {}
    assert stages.running() is None


def test_start_and_stop_are_for_the_whole_process() -> None:
    try:
        measuring = stages.start()
        assert stages.start() is measuring is stages.running()
        with stage("scan"):
            pass
        assert measuring.times()["scan"].calls == 1
    finally:
        stages.stop()
    with stage("scan"):
        pass
    assert measuring.times()["scan"].calls == 1


def test_a_stage_inside_another_counts_once(clock) -> None:
    with measured() as measuring:
        for _ in range(2):
            with stage("read"):
                clock(1)
                with stage("hash"):
                    clock(10)
                    with stage("hash"):
                        clock(100)
                with stage("write"):
                    clock(1000)
    assert measuring.elapsed_s() == 2222
    assert measuring.times() == {
        "read": StageTime(2, 2),
        "hash": StageTime(220, 4),
        "write": StageTime(2000, 2),
    }
    assert sum(time.seconds for time in measuring.times().values()) == measuring.elapsed_s()


def test_stages_come_in_one_order_whatever_ran_first() -> None:
    with measured() as measuring:
        for name in reversed(STAGE_NAMES):
            with stage(name):
                pass
    assert tuple(measuring.times()) == STAGE_NAMES


def test_a_failure_inside_is_counted_and_goes_on(clock) -> None:
    with measured() as measuring:
        with pytest.raises(KeyError), stage("sync"):
            clock(3)
            raise KeyError
        with stage("catalog"):
            clock(4)
    assert measuring.times() == {"sync": StageTime(3, 1), "catalog": StageTime(4, 1)}


def test_an_open_stage_adds_to_the_clock_it_began_on(clock) -> None:
    with measured() as measuring:
        opened = stage("plan")
        opened.__enter__()
        clock(5)
    opened.__exit__(None, None, None)
    assert measuring.times() == {"plan": StageTime(5, 1)}


def test_threads_lose_no_call_and_do_not_nest_in_each_other(clock) -> None:
    runs, threads = 2000, 8
    barrier = threading.Barrier(threads)

    def work() -> None:
        barrier.wait()
        for _ in range(runs):
            with stage("encode"):
                with stage("write"):
                    pass

    with measured() as measuring:
        with stage("read"):
            workers = [threading.Thread(target=work) for _ in range(threads)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
            clock(7)
    assert measuring.times() == {
        "read": StageTime(7, 1),
        "encode": StageTime(0, runs * threads),
        "write": StageTime(0, runs * threads),
    }


def test_stages_of_tasks_that_take_turns_do_not_nest_in_each_other(clock) -> None:
    async def one(name, begun, end) -> None:
        with stage(name):
            begun.set()
            await end.wait()

    async def both() -> None:
        events = [asyncio.Event() for _ in range(4)]
        sending = asyncio.create_task(one("send", events[0], events[2]))
        await events[0].wait()
        receiving = asyncio.create_task(one("place", events[1], events[3]))
        await events[1].wait()
        clock(2)
        events[2].set()  # the first ends first, although it was entered first
        await sending
        clock(3)
        events[3].set()
        await receiving

    with measured() as measuring:
        asyncio.run(both())
    assert measuring.times() == {"send": StageTime(2, 1), "place": StageTime(5, 1)}


def test_work_in_threads_for_one_stage_never_makes_its_own_time_negative(clock) -> None:
    async def hold(barrier: threading.Barrier) -> None:
        def work() -> None:
            with stage("decode"):
                barrier.wait(10)
                if barrier.wait(10) == 0:
                    clock(6)
                barrier.wait(10)

        await asyncio.gather(asyncio.to_thread(work), asyncio.to_thread(work))

    async def whole() -> None:
        with stage("verify"):
            await hold(threading.Barrier(2))

    with measured() as measuring:
        asyncio.run(whole())
    assert measuring.times() == {"verify": StageTime(0, 1), "decode": StageTime(12, 2)}
