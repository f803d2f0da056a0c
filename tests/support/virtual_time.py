"""An event loop whose clock jumps: waiting for a deadline costs nothing. In-memory streams only."""

import asyncio
import selectors
from collections.abc import Coroutine
from types import SimpleNamespace
from typing import Any

import pytest

_LATEST_S = 100_000.0


class _Selector(selectors.DefaultSelector):
    """Never sleeps: where the loop would, its clock goes on instead."""

    now_s = 1000.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "everybody waits for somebody else"
            self.now_s += max(timeout, 0.0)
            assert self.now_s < _LATEST_S, "nobody ever gives up"
        return ready


class _Loop(asyncio.SelectorEventLoop):
    def __init__(self) -> None:
        self.clock = _Selector()
        super().__init__(self.clock)

    def time(self) -> float:
        return self.clock.now_s


def run_in_virtual_time(
    main: Coroutine[Any, Any, Any], monkeypatch: pytest.MonkeyPatch, *modules: str
) -> tuple[Any, float]:
    """What `main` returns and how many seconds it took by its clock, which the `modules`, that
    import `time`, see too. Threads do not work."""
    loop = _Loop()
    for module in modules:
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(monotonic=loop.time))
    began_s = loop.time()
    try:
        return loop.run_until_complete(main), loop.time() - began_s
    finally:
        loop.close()
