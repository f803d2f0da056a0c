"""Where the time of this run went, for --profile and the `stages` of JSON results."""

import os
import sys
from collections.abc import Iterator

from dmsync.storage.stages import StageClock
from dmsync.surfaces.cli import output


def stages_fields(clock: StageClock) -> dict[str, dict[str, float | int]]:
    """JSON: seconds and calls by stage, those that were met."""
    return {
        name: {"seconds": round(time.seconds, 6), "calls": time.calls}
        for name, time in clock.times().items()
    }


def print_profile(clock: StageClock, *, as_json: bool) -> None:
    """The stages on stderr, whatever became of the command; a stderr that is gone is no failure."""
    try:
        if as_json:
            output.write_line(output.json_text(_profile_fields(clock)), sys.stderr)
        else:
            for line in output.table(_rows(clock)):
                output.write_line(line, sys.stderr)
        sys.stderr.flush()
    except (OSError, ValueError):
        pass  # nobody reads it


def _profile_fields(clock: StageClock) -> dict[str, object]:
    spent = os.times()
    return {
        "type": "profile",
        "elapsed_s": round(clock.elapsed_s(), 6),
        "user_s": spent.user,
        "system_s": spent.system,
        "stages": stages_fields(clock),
    }


def _rows(clock: StageClock) -> Iterator[tuple[str, str, str, str]]:
    """Stages may overlap in threads: then they come to more than the total, and no time is left
    for `other`."""
    elapsed_s = clock.elapsed_s()
    left_s = elapsed_s
    yield "stage", "seconds", "share", "calls"
    for name, time in clock.times().items():
        left_s -= time.seconds
        yield name, f"{time.seconds:7.3f}", _share(time.seconds, elapsed_s), str(time.calls)
    if left_s > 0:
        yield "other", f"{left_s:7.3f}", _share(left_s, elapsed_s), ""
    yield "total", f"{elapsed_s:7.3f}", _share(elapsed_s, elapsed_s), ""
    spent = os.times()
    yield "CPU", f"{spent.user + spent.system:7.3f}", "", ""


def _share(seconds: float, elapsed_s: float) -> str:
    return f"{100 * seconds / elapsed_s:4.0f}%" if elapsed_s > 0 else ""
