"""Jobs on threads: order, bounds, errors, and that nothing is left running."""

import threading
import time
from collections.abc import Iterator
from contextlib import closing

import pytest

from dmsync.engine.ordered_jobs import OrderedJobs


def running() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("dm-jobs")]


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_results_come_in_the_order_of_the_items(threads: int) -> None:
    def job(number: int) -> int:
        time.sleep(0.002 * (number % 3 == 0))
        return number * number

    with OrderedJobs(threads) as jobs:
        assert list(jobs.map(job, range(50), ahead=3)) == [n * n for n in range(50)]
        assert list(jobs.map(job, [], ahead=3)) == []
    assert running() == []


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_no_more_items_are_taken_than_are_ahead(threads: int) -> None:
    taken = 0

    def items() -> Iterator[int]:
        nonlocal taken
        for number in range(20):
            taken += 1
            yield number

    with OrderedJobs(threads) as jobs:
        for done, _ in enumerate(jobs.map(lambda number: number, items(), ahead=3), 1):
            assert taken <= done + 3


@pytest.mark.parametrize("threads", [0, 2])
def test_an_error_is_raised_when_its_turn_comes(threads: int) -> None:
    def job(number: int) -> int:
        if number == 5:
            raise OSError(5, "five")
        return number

    got = []
    with OrderedJobs(threads) as jobs, pytest.raises(OSError, match="five"):
        for result in jobs.map(job, range(20), ahead=4):
            got.append(result)
    assert got == [0, 1, 2, 3, 4]
    assert running() == []


def test_giving_up_leaves_no_job_of_the_map_running() -> None:
    active: set[int] = set()

    def job(number: int) -> int:
        active.add(number)
        time.sleep(0.01)
        active.discard(number)
        return number

    with OrderedJobs(2) as jobs:
        with closing(jobs.map(job, range(100), ahead=6)) as results:
            assert next(results) == 0
        assert active == set()
        assert jobs.start(job, 200).result() == 200, "others can still be given"


def test_closing_drops_what_has_not_begun() -> None:
    done = []

    def job() -> None:
        time.sleep(0.01)
        done.append(1)

    jobs = OrderedJobs(1)
    futures = [jobs.start(job) for _ in range(50)]
    jobs.close()
    assert len(done) < 50
    assert all(future.done() for future in futures)
    assert running() == []
