"""Asynchronous work of a command: nothing it waits for can be lost, nothing is printed but ours."""

import asyncio
import time
from typing import Any

import pytest

from dmsync.surfaces.cli.interrupts import run_async


@pytest.mark.timeout(20)
def test_a_wakeup_that_is_lost_costs_a_moment_only() -> None:
    async def work() -> str:
        loop: Any = asyncio.get_running_loop()
        loop._write_to_self = lambda: None  # the kernel has no memory for the byte
        return await asyncio.to_thread(lambda: time.sleep(0.05) or "done")

    assert run_async(work()) == "done"


def test_asyncio_prints_nothing_of_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    async def work() -> None:
        failure = OSError(12, "Cannot allocate memory")
        told = {"message": "Fatal read error on pipe transport", "exception": failure}
        asyncio.get_running_loop().call_exception_handler(told)

    run_async(work())
    assert capfd.readouterr() == ("", "")
