"""How far long work has come: phase, bytes done of all, rate, time left, where somebody looks.

On a terminal one line that keeps up with the work and leaves nothing behind; elsewhere one line a
minute, with --progress one a second and at the end of each phase; with --json lines of JSON before
the summary (on stderr where the answer is one document, and only with --progress); nothing with
-q. DM_PROGRESS_FPS sets the pace of all of them, 0 turns them off.

The work only leaves its counts here, which costs next to nothing; a thread of our own looks at
them a few times a second. So a stall is seen as one, and work that is done before the first look
draws nothing. Neither the cursor nor the terminal's modes are touched: there is nothing to undo
when the process is killed.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Final

from dmsync.storage import stages
from dmsync.surfaces.cli import output
from dmsync.surfaces.cli.profile import stages_fields

if TYPE_CHECKING:
    from dmsync.surfaces.cli.invocation import Invocation

TERMINAL_DELAY_S: Final = 2.0
TERMINAL_INTERVAL_S: Final = 0.2
PLAIN_INTERVAL_S: Final = 60.0
JSON_INTERVAL_S: Final = 1.0
ASKED_INTERVAL_S: Final = 1.0
"""Between lines when --progress asks for them."""
INTERVAL_S_MIN: Final = 0.1
COLUMNS_UNKNOWN: Final = 80
RATE_WINDOW_S: Final = 10.0
"""The rate is that of the last seconds, so that a stall shows."""
ETA_AFTER_S: Final = 1.0
"""What the first moments of a phase promise is not worth telling."""
_CLOSE_WAIT_S: Final = 1.0
"""How long a terminal that takes no output may hold up a command that is done."""
_ERASE_LINE: Final = "\r\x1b[K"


class Progress:
    """The counts of the work (engine.progress.Progress); this base shows them to nobody."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.phase_name = ""
        self.bytes_done = 0
        self.items_done = 0
        self.bytes_total: int | None = None
        self.items_total: int | None = None
        self._sizes: Iterable[int] | None = None
        self._counted: Iterable[int] | None = None
        """The sizes of this phase, whether or not they are added up already."""
        self._lock = threading.Lock()
        self._is_begun = False
        self._started_s = self._phase_started_s = time.monotonic()
        self._samples: deque[tuple[float, int]] = deque()

    def phase(
        self,
        name: str,
        *,
        bytes_total: int | None = None,
        items_total: int | None = None,
        sizes: Iterable[int] | None = None,
    ) -> None:
        """A new part of the work: counts start again."""
        with self._lock:
            self._end_phase()
            self.phase_name = name
            self.bytes_done = self.items_done = 0
            self.bytes_total = bytes_total
            self.items_total = items_total
            self._sizes = self._counted = sizes
            self._is_begun = True
            self._phase_started_s = time.monotonic()
            self._samples.clear()
            self._samples.append((self._phase_started_s, 0))

    def reached(self, bytes_done: int, items_done: int = 0) -> None:
        """So much of this phase is done."""
        self.bytes_done = bytes_done
        self.items_done = items_done
        self._is_begun = True

    def _end_phase(self) -> None:
        """The phase is over, with its last counts; the lock is held."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Nothing is drawn meanwhile, and what was drawn is gone: others may write."""
        yield

    # --- what the counts say ---------------------------------------------------------------------

    def rate(self, now_s: float) -> float:
        """Bytes a second lately; each call is a sample."""
        samples = self._samples
        if not samples:
            samples.append((self._phase_started_s, 0))
        while len(samples) > 1 and now_s - samples[1][0] >= RATE_WINDOW_S:
            samples.popleft()
        since_s, since_bytes = samples[0]
        bytes_done = self.bytes_done
        samples.append((now_s, bytes_done))
        return (bytes_done - since_bytes) / (now_s - since_s) if now_s > since_s else 0.0

    def share_done(self) -> float | None:
        """From 0 to 1, where the end is known: of the bytes, or of the items where none count."""
        for done, total in (
            (self.bytes_done, self.bytes_total),
            (self.items_done, self.items_total),
        ):
            if total:
                return min(1.0, done / total)
        return None

    def eta_s(self, now_s: float) -> float | None:
        """Seconds left at this phase's pace so far, where the end is known."""
        share = self.share_done()
        elapsed_s = now_s - self._phase_started_s
        if not share or elapsed_s < ETA_AFTER_S:
            return None
        return elapsed_s * (1 - share) / share

    def elapsed_s(self, now_s: float) -> float:
        """Seconds since the command's work began."""
        return now_s - self._started_s

    def close(self, *, is_cut: bool = False) -> None:
        """Show nothing from now on, and take away what was drawn; `is_cut`: the work failed."""

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close(is_cut=kind is not None)


class ShownProgress(Progress):
    """Counts that a thread looks at now and then, to draw them."""

    def __init__(
        self, title: str, *, delay_s: float, interval_s: float, each_phase: bool = False
    ) -> None:
        """`each_phase`: also draw the end of every phase, however short."""
        super().__init__(title)
        self._delay_s = max(delay_s, INTERVAL_S_MIN)
        self._interval_s = max(interval_s, INTERVAL_S_MIN)
        self._each_phase = each_phase
        self._ended = threading.Event()
        self._is_refused = False
        self._thread = threading.Thread(target=self._look, name="progress", daemon=True)

    def _look(self) -> None:
        wait_s = self._delay_s
        while not self._ended.wait(wait_s):
            wait_s = self._interval_s
            with self._lock:
                if not self._ended.is_set():
                    self._show()
            self._find_totals()

    def _find_totals(self) -> None:
        """Add up what the phase left to be added up; it may be over before that is done."""
        sizes, self._sizes = self._sizes, None
        if sizes is None:
            return
        bytes_total = items_total = 0
        try:
            for size in sizes:
                bytes_total += size
                items_total += 1
                if self._ended.is_set():
                    return
        except Exception:  # noqa: BLE001 - whatever is wrong, the work itself meets and tells it
            return
        with self._lock:
            if self._counted is sizes:
                self.bytes_total, self.items_total = bytes_total, items_total

    def _show(self) -> None:
        """Draw, if there is anything; an output that is gone fails the command's own writing."""
        if not self._is_begun or self._is_refused:
            return
        try:
            self.draw(time.monotonic())
        except (OSError, ValueError):
            self._is_refused = True

    def _end_phase(self) -> None:
        if self._each_phase and self._is_begun:
            self._show()

    def draw(self, now_s: float) -> None:
        """Show the state of the work."""
        raise NotImplementedError

    def erase(self) -> None:
        """Take away what `draw` left, where it can be."""

    @contextmanager
    def aside(self) -> Iterator[None]:
        with self._lock:
            self.erase()
            yield

    def close(self, *, is_cut: bool = False) -> None:
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join(_CLOSE_WAIT_S)
        if not self._lock.acquire(timeout=_CLOSE_WAIT_S):
            return
        try:
            if not is_cut:
                self._end_phase()
            self.erase()
        finally:
            self._lock.release()

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self


class LineProgress(ShownProgress):
    """Lines for logs."""

    def draw(self, now_s: float) -> None:
        parts = [self._head(), *self._counts(now_s)]
        parts.append(f"{output.human_duration(self.elapsed_s(now_s))} so far")
        output.write_line(", ".join(parts), sys.stderr)
        sys.stderr.flush()

    def _head(self) -> str:
        title = output.escape_line(self.title)
        share = self.share_done()
        percent = "" if share is None else f" {_percent(share)}"
        return f"{title}: {self.phase_name or 'working'}{percent}"

    def _counts(self, now_s: float) -> Iterator[str]:
        rate = self.rate(now_s)
        if self.bytes_done or self.bytes_total:
            yield _amount(self.bytes_done, self.bytes_total)
            yield f"{output.human_size(int(rate))}/s"
        if self.items_done or self.items_total:
            yield _items(self.items_done, self.items_total)
        eta_s = self.eta_s(now_s)
        if eta_s is not None:
            yield f"{output.human_duration(eta_s)} left"


class TerminalProgress(ShownProgress):
    """One line that is written over, never wider than the terminal is at the moment."""

    def __init__(self, title: str, *, delay_s: float, interval_s: float) -> None:
        super().__init__(title, delay_s=delay_s, interval_s=interval_s)
        self._is_drawn = False

    def draw(self, now_s: float) -> None:
        descriptor = sys.stderr.fileno()
        if not _is_foreground(descriptor):
            return
        line = fitting_line(self._parts(now_s), _columns(descriptor) - 1)
        sys.stderr.write(_ERASE_LINE + line)
        sys.stderr.flush()
        self._is_drawn = True

    def erase(self) -> None:
        if not self._is_drawn:
            return
        self._is_drawn = False
        try:
            if _is_foreground(sys.stderr.fileno()):
                sys.stderr.write(_ERASE_LINE)
                sys.stderr.flush()
        except (OSError, ValueError):
            self._is_refused = True

    def _parts(self, now_s: float) -> dict[str, str]:
        """Pieces of the line, by the names of PART_ORDER."""
        rate, share, eta_s = self.rate(now_s), self.share_done(), self.eta_s(now_s)
        parts = {
            "title": f"{output.escape_name(self.title)}:",
            "phase": self.phase_name or "working",
        }
        if share is not None:
            parts["share"] = _percent(share)
        if self.bytes_done or self.bytes_total:
            parts["amount"] = _amount(self.bytes_done, self.bytes_total)
            parts["rate"] = f"{output.human_size(int(rate))}/s"
        if self.items_done or self.items_total:
            parts["items"] = _items(self.items_done, self.items_total)
        if eta_s is None:
            parts["time"] = output.human_duration(self.elapsed_s(now_s))
        else:
            parts["time"] = f"{output.human_duration(eta_s)} left"
        return parts


PART_ORDER: Final = ("title", "phase", "share", "amount", "rate", "items", "time")
_DROPPED_FIRST: Final = ("items", "title", "amount", "rate", "phase", "time")


def fitting_line(parts: dict[str, str], width: int) -> str:
    """The parts in their order, as many as fit, the least telling ones left out first."""
    kept = dict(parts)
    for name in (None, *_DROPPED_FIRST):
        if name is not None:
            kept.pop(name, None)
        line = " ".join(kept[part] for part in PART_ORDER if part in kept)
        if line and len(line) <= width:
            return line
    last = parts.get("share") or parts["phase"]
    return last[: max(0, width)]


class JsonProgress(ShownProgress):
    """JSON lines of `"type": "progress"`, on stdout or, `beside` a document, on stderr."""

    def __init__(
        self,
        title: str,
        *,
        delay_s: float,
        interval_s: float,
        each_phase: bool = False,
        beside: bool = False,
    ) -> None:
        super().__init__(title, delay_s=delay_s, interval_s=interval_s, each_phase=each_phase)
        self._beside = beside

    def draw(self, now_s: float) -> None:
        stream = sys.stderr if self._beside else sys.stdout
        output.write_line(output.json_text(self._fields(now_s)), stream)
        stream.flush()

    def _fields(self, now_s: float) -> dict[str, object]:
        eta_s = self.eta_s(now_s)
        return {
            "type": "progress",
            "title": self.title,
            "phase": self.phase_name,
            "bytes_done": self.bytes_done,
            "bytes_total": self.bytes_total,
            "items_done": self.items_done,
            "items_total": self.items_total,
            "bytes_per_s": round(self.rate(now_s)),
            "eta_s": None if eta_s is None else round(eta_s, 1),
            "elapsed_s": round(self.elapsed_s(now_s), 3),
            "stages": stages_fields(stages.start()),
        }


def _percent(share: float) -> str:
    return f"{int(share * 100)}%"


def _amount(done: int, total: int | None) -> str:
    shown = output.human_size(done) if done else "0 B"
    return f"{shown} of {output.human_size(total)}" if total else shown


def _items(done: int, total: int | None) -> str:
    return f"{done} of {output.counted(total, 'item')}" if total else output.counted(done, "item")


def _columns(descriptor: int) -> int:
    try:
        return os.get_terminal_size(descriptor).columns or COLUMNS_UNKNOWN
    except OSError:
        return COLUMNS_UNKNOWN


def _is_foreground(descriptor: int) -> bool:
    """A job in the background leaves the terminal to whoever has it."""
    try:
        return os.tcgetpgrp(descriptor) == os.getpgrp()
    except OSError:
        return True


def make_progress(title: str, invocation: "Invocation", *, is_query: bool) -> Progress:
    """The display that fits the run: --progress asks for one, --no-progress and -q for none. A
    query's answer is a single document."""
    settings, wanted = invocation.settings, invocation.shows_progress
    fps = settings.progress_fps
    if invocation.quiet or wanted is False or (fps == 0 and not wanted):
        return Progress(title)
    asked_s = 1 / fps if fps else ASKED_INTERVAL_S if wanted else None
    if invocation.as_json:
        pace_s = asked_s or JSON_INTERVAL_S
        if is_query and not wanted:
            return Progress(title)
        return JsonProgress(
            title,
            delay_s=pace_s,
            interval_s=pace_s,
            each_phase=bool(wanted),
            beside=is_query,
        )
    # the log of -vv and a line that is written over would garble each other
    if settings.terminal and sys.stderr.isatty() and invocation.verbose < 2:
        return TerminalProgress(
            title,
            delay_s=TERMINAL_DELAY_S,
            interval_s=1 / fps if fps else TERMINAL_INTERVAL_S,
        )
    pace_s = asked_s or PLAIN_INTERVAL_S
    return LineProgress(title, delay_s=pace_s, interval_s=pace_s, each_phase=bool(wanted))
