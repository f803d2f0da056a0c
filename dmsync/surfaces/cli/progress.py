"""How far long work has come: bytes, rate and time left, on stderr, where somebody looks.

On a terminal a bar appears when the work passes 2 s; otherwise one line a minute; JSON lines on
stdout with --json; nothing with -q. DM_PROGRESS_FPS sets the rate of all of them, 0 turns it off.
"""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final

from dmsync.surfaces.cli import output

if TYPE_CHECKING:
    from dmsync.surfaces.cli.invocation import Invocation

TERMINAL_DELAY_S: Final = 2.0
TERMINAL_FPS: Final = 5.0
PLAIN_INTERVAL_S: Final = 60.0
JSON_INTERVAL_S: Final = 1.0
_RATE_WINDOW_S: Final = 10.0


class Progress:
    """Counts work done and shows it now and then; this base shows nothing.

    Each part of the engine tells in its own words; all end in the counts here.
    """

    def __init__(self, title: str, *, delay_s: float, interval_s: float) -> None:
        self.title = title
        self.done_bytes = 0
        self.items = 0
        self.total_items: int | None = None
        self._started_s = time.monotonic()
        self._interval_s = interval_s
        self._next_s = self._started_s + delay_s
        self._phase_started_s = self._started_s
        self._rate_from = (self._started_s, 0)

    def __call__(self, done_bytes: int, items: int) -> None:
        """So many bytes and files of this phase are done (engine.capture, engine.restore)."""
        self.done_bytes = done_bytes
        self.items = items
        self._tick()

    def advance(self, size: int = 0, items: int = 0) -> None:
        """So much more is done (engine.fsck)."""
        self.done_bytes += size
        self.items += items
        self._tick()

    def phase(self, name: str) -> None:
        """A new phase of the same work: counts start again (engine.ports.SyncProgress)."""
        self.title = name
        self.done_bytes = self.items = 0
        self.total_items = None
        self._phase_started_s = time.monotonic()
        self._rate_from = (self._phase_started_s, 0)
        self._tick()

    def transferred(self, objects: int, objects_total: int, bytes_done: int) -> None:
        """So many of the objects to be sent have gone (engine.ports.SyncProgress)."""
        self.done_bytes = bytes_done
        self.items = objects
        self.total_items = objects_total
        self._tick()

    def _tick(self) -> None:
        now_s = time.monotonic()
        if now_s >= self._next_s:
            self._next_s = now_s + self._interval_s
            self.draw(now_s)

    def rate(self, now_s: float) -> float:
        """Bytes a second over the last seconds, so that a stall shows."""
        since_s, since_bytes = self._rate_from
        elapsed_s = now_s - since_s
        if elapsed_s <= 0:
            return 0.0
        speed = (self.done_bytes - since_bytes) / elapsed_s
        if elapsed_s > _RATE_WINDOW_S:
            self._rate_from = (now_s, self.done_bytes)
        return speed

    def share_done(self) -> float | None:
        """From 0 to 1, where the end is known."""
        if not self.total_items:
            return None
        return min(1.0, self.items / self.total_items)

    def eta_s(self, now_s: float) -> float | None:
        """Seconds left at this phase's pace so far, where the end is known."""
        share = self.share_done()
        if not share:
            return None
        return (now_s - self._phase_started_s) * (1 - share) / share

    def elapsed_s(self, now_s: float) -> float:
        return now_s - self._started_s

    def draw(self, now_s: float) -> None:
        """Show the state of the work; called at the display's own pace."""

    def close(self) -> None:
        """Take the display away."""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class PlainProgress(Progress):
    """Lines for logs: one a minute."""

    def draw(self, now_s: float) -> None:
        output.write_line(self.line(now_s), sys.stderr)
        sys.stderr.flush()

    def line(self, now_s: float) -> str:
        parts = [f"{output.escape_text(self.title)}: {output.human_size(self.done_bytes)}"]
        if self.items:
            total = f" of {self.total_items}" if self.total_items else ""
            parts.append(f"{self.items}{total} items")
        parts.append(f"{output.human_size(int(self.rate(now_s)))}/s")
        eta_s = self.eta_s(now_s)
        if eta_s is not None:
            parts.append(f"{output.human_duration(eta_s)} left")
        parts.append(f"{output.human_duration(self.elapsed_s(now_s))} so far")
        return ", ".join(parts)


class JsonProgress(Progress):
    """JSON lines of `"type": "progress"`."""

    def draw(self, now_s: float) -> None:
        output.write_json_line(
            {
                "type": "progress",
                "title": self.title,
                "done_bytes": self.done_bytes,
                "items": self.items,
                "total_items": self.total_items,
                "bytes_per_s": round(self.rate(now_s)),
                "elapsed_s": round(self.elapsed_s(now_s), 3),
            }
        )


class TerminalProgress(Progress):
    """A bar by rich, imported only when the work turned out to be long."""

    def __init__(self, title: str, *, delay_s: float, interval_s: float, color: bool) -> None:
        super().__init__(title, delay_s=delay_s, interval_s=interval_s)
        self._color = color
        self._bar: Any = None
        self._task: Any = None

    def draw(self, now_s: float) -> None:
        if self._bar is None:
            self._open()
        eta_s = self.eta_s(now_s)
        self._bar.update(
            self._task,
            description=output.escape_name(self.title),
            completed=self.items,
            total=self.total_items,
            amount=self._amount(now_s),
            left="" if eta_s is None else f"{output.human_duration(eta_s)} left",
        )
        self._bar.refresh()

    def _amount(self, now_s: float) -> str:
        size = output.human_size(self.done_bytes)
        return f"{size}, {output.human_size(int(self.rate(now_s)))}/s, {self.items} items"

    def _open(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn
        from rich.progress import Progress as Bar

        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[amount]}", markup=False),
            TextColumn("{task.fields[left]}", markup=False),
            console=Console(stderr=True, no_color=not self._color, highlight=False),
            auto_refresh=False,
            transient=True,
        )
        self._task = self._bar.add_task("", total=None, amount="", left="")
        self._bar.start()

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def make_progress(title: str, invocation: "Invocation") -> Progress:
    """The display that fits the run."""
    settings = invocation.settings
    fps = settings.progress_fps
    if invocation.quiet or fps == 0:
        never = float("inf")
        return Progress(title, delay_s=never, interval_s=never)
    interval_s = None if fps is None else 1 / fps
    if invocation.as_json:
        pace_s = interval_s or JSON_INTERVAL_S
        return JsonProgress(title, delay_s=pace_s, interval_s=pace_s)
    if settings.terminal and sys.stderr is not None and sys.stderr.isatty():
        return TerminalProgress(
            title,
            delay_s=TERMINAL_DELAY_S,
            interval_s=interval_s or 1 / TERMINAL_FPS,
            color=settings.color,
        )
    pace_s = interval_s or PLAIN_INTERVAL_S
    return PlainProgress(title, delay_s=pace_s, interval_s=pace_s)
