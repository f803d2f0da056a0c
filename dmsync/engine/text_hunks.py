"""Unified hunks between two texts, in bounded time whatever the texts are.

Lines that both texts have exactly once anchor the comparison (patience diff); between anchors the
shortest edit is sought (Myers 1986) within a budget of steps shared by the whole comparison. What
the budget does not reach is shown as removed and added as a whole: coarse, and still right.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

TEXT_BYTES_MAX: Final = 8 * 1024 * 1024
"""Longer files are not shown as text."""
LINES_MAX: Final = 1_000_000
"""Nor are files of more lines: each takes memory of its own."""
CONTEXT_LINES: Final = 3
SNIFFED_BYTES: Final = 8 * 1024
"""Beginning of a file that tells whether it is text."""
_STEPS_MAX: Final = 3_000_000
"""About two seconds."""
_EDITS_MAX: Final = 800
"""Edits between two anchors from which on they are shown as a whole: memory grows with the square
of them."""
_CONTROL_SHARE_MAX: Final = 0.1

_Lines = list[bytes]
Match = tuple[int, int, int]
"""Equal lines: where they begin in the old text, in the new one, and how many they are."""


@dataclass(frozen=True, slots=True)
class Hunk:
    """Changed lines with lines around them. Line numbers count from 1; a side without lines names
    the line before. `lines` begin with ` `, `-` or `+` and have no newline; `\\` begins the remark
    that the line before it has none in its file either."""

    old_start: int
    old_count: int
    new_start: int
    new_count: int
    lines: tuple[bytes, ...]

    def header(self) -> str:
        old = f"{self.old_start},{self.old_count}" if self.old_count != 1 else f"{self.old_start}"
        new = f"{self.new_start},{self.new_count}" if self.new_count != 1 else f"{self.new_start}"
        return f"@@ -{old} +{new} @@"


def is_text(data: bytes) -> bool:
    """Is this a text's beginning? No NUL in the first 8 KiB, and UTF-8, or nearly all printable."""
    head = data[:SNIFFED_BYTES]
    if b"\0" in head:
        return False
    try:
        head.decode("utf-8")
    except UnicodeDecodeError as exc:
        # A character may be cut where the beginning ends.
        if exc.reason != "unexpected end of data" or len(data) == len(head):
            return _control_share(head) <= _CONTROL_SHARE_MAX and _is_mostly_ascii(head)
    return _control_share(head) <= _CONTROL_SHARE_MAX


def _control_share(head: bytes) -> float:
    control = sum(1 for byte in head if byte < 32 and byte not in b"\t\n\f\r\x1b")
    return control / max(1, len(head))


def _is_mostly_ascii(head: bytes) -> bool:
    return sum(1 for byte in head if byte < 128) * 2 >= len(head)


def text_hunks(old: bytes, new: bytes, *, context: int = CONTEXT_LINES) -> list[Hunk]:
    """The hunks that lead from one text to the other, with up to `context` lines around each."""
    before, after = _split(old), _split(new)
    return list(_hunks(before, after, matching_lines(before, after), max(0, context)))


def _split(text: bytes) -> _Lines:
    """Lines with their newlines; only a newline ends one."""
    lines = [line + b"\n" for line in text.split(b"\n")]
    last = lines.pop()
    if last != b"\n":
        lines.append(last[:-1])
    return lines


# --- which lines are the same --------------------------------------------------------------------


def matching_lines(old: _Lines, new: _Lines) -> list[Match]:
    """Runs of equal lines, ascending in both texts, none touching the next in both."""
    budget = _Budget(_STEPS_MAX)
    matches: list[Match] = []
    at_old = at_new = 0
    first, last = _common_ends(old, new)
    stop_old, stop_new = len(old) - last, len(new) - last
    anchors = _anchors(old, new, first, stop_old, stop_new)
    pairs = [*((i, i) for i in range(first)), *anchors, (stop_old, stop_new)]
    for anchor_old, anchor_new in pairs:
        for i, j, count in _shortest(old, new, at_old, anchor_old, at_new, anchor_new, budget):
            _add(matches, i, j, count)
        if anchor_old < stop_old:
            _add(matches, anchor_old, anchor_new, 1)
        at_old, at_new = anchor_old + 1, anchor_new + 1
    if last:
        _add(matches, stop_old, stop_new, last)
    return matches


@dataclass(slots=True)
class _Budget:
    steps: int


def _add(matches: list[Match], i: int, j: int, count: int) -> None:
    """Append a run, joined to the last one where it goes on in both texts."""
    if matches:
        last_i, last_j, last_count = matches[-1]
        if (last_i + last_count, last_j + last_count) == (i, j):
            matches[-1] = (last_i, last_j, last_count + count)
            return
    if count:
        matches.append((i, j, count))


def _common_ends(old: _Lines, new: _Lines) -> tuple[int, int]:
    most = min(len(old), len(new))
    first = 0
    while first < most and old[first] == new[first]:
        first += 1
    last = 0
    while last < most - first and old[-1 - last] == new[-1 - last]:
        last += 1
    return first, last


def _anchors(
    old: _Lines, new: _Lines, first: int, stop_old: int, stop_new: int
) -> list[tuple[int, int]]:
    """Places of lines that occur once in each text: the longest run ascending in both."""
    old_counts, new_counts = Counter(old[first:stop_old]), Counter(new[first:stop_new])
    places = {line: j for j, line in enumerate(new[first:stop_new], first) if new_counts[line] == 1}
    pairs = [
        (i, places[line])
        for i, line in enumerate(old[first:stop_old], first)
        if old_counts[line] == 1 and line in places
    ]
    ends: list[int] = []
    """The least place in `new` that a run of each length ends at."""
    tails: list[int] = []
    before: list[int] = []
    for number, (_, j) in enumerate(pairs):
        length = bisect_left(ends, j)
        before.append(tails[length - 1] if length else -1)
        if length == len(ends):
            ends.append(j)
            tails.append(number)
        else:
            ends[length], tails[length] = j, number
    chosen: list[tuple[int, int]] = []
    number = tails[-1] if tails else -1
    while number >= 0:
        chosen.append(pairs[number])
        number = before[number]
    return chosen[::-1]


def _shortest(
    old: _Lines,
    new: _Lines,
    old_start: int,
    old_stop: int,
    new_start: int,
    new_stop: int,
    budget: _Budget,
) -> list[Match]:
    """Single equal lines of the shortest edit between two stretches; none when it is too long."""
    size_old, size_new = old_stop - old_start, new_stop - new_start
    if size_old <= 0 or size_new <= 0:
        return []
    furthest = {1: 0}
    trace: list[dict[int, int]] = []
    for edits in range(min(size_old + size_new, _EDITS_MAX) + 1):
        trace.append({k: furthest[k] for k in range(-edits - 1, edits + 2) if k in furthest})
        for k in range(-edits, edits + 1, 2):
            down = k == -edits or (k != edits and furthest[k - 1] < furthest[k + 1])
            x = furthest[k + 1] if down else furthest[k - 1] + 1
            y = x - k
            budget.steps -= 1
            while (
                x < size_old and y < size_new and old[old_start + x] == new[new_start + y]
            ):  # a snake
                x += 1
                y += 1
                budget.steps -= 1
            furthest[k] = x
            if x >= size_old and y >= size_new:
                return _walked_back(trace, size_old, size_new, old_start, new_start)
        if budget.steps < 0:
            return []
    return []


def _walked_back(
    trace: list[dict[int, int]], x: int, y: int, old_start: int, new_start: int
) -> list[Match]:
    matches: list[Match] = []
    for edits in range(len(trace) - 1, -1, -1):
        furthest = trace[edits]
        k = x - y
        down = k == -edits or (k != edits and furthest[k - 1] < furthest[k + 1])
        k_before = k + 1 if down else k - 1
        x_before = furthest[k_before]
        y_before = x_before - k_before
        while x > max(x_before, 0) and y > max(y_before, 0):
            x -= 1
            y -= 1
            matches.append((old_start + x, new_start + y, 1))
        x, y = x_before, y_before
    return matches[::-1]


# --- hunks ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Edit:
    """Lines `old_start:old_stop` of the old text give way to `new_start:new_stop` of the new."""

    old_start: int
    old_stop: int
    new_start: int
    new_stop: int


def _edits(old: _Lines, new: _Lines, matches: list[Match]) -> Iterator[_Edit]:
    at_old = at_new = 0
    for i, j, count in [*matches, (len(old), len(new), 0)]:
        if i > at_old or j > at_new:
            yield _Edit(at_old, i, at_new, j)
        at_old, at_new = i + count, j + count


def _hunks(old: _Lines, new: _Lines, matches: list[Match], context: int) -> Iterator[Hunk]:
    group: list[_Edit] = []
    for edit in _edits(old, new, matches):
        if group and edit.old_start - group[-1].old_stop > 2 * context:
            yield _hunk(old, new, group, context)
            group = []
        group.append(edit)
    if group:
        yield _hunk(old, new, group, context)


def _hunk(old: _Lines, new: _Lines, group: list[_Edit], context: int) -> Hunk:
    before = min(context, group[0].old_start)
    after = min(context, len(old) - group[-1].old_stop)
    old_start, old_stop = group[0].old_start - before, group[-1].old_stop + after
    new_start, new_stop = group[0].new_start - before, group[-1].new_stop + after
    lines: list[bytes] = []
    at_old = old_start
    for edit in group:
        _show(lines, b" ", old[at_old : edit.old_start])
        _show(lines, b"-", old[edit.old_start : edit.old_stop])
        _show(lines, b"+", new[edit.new_start : edit.new_stop])
        at_old = edit.old_stop
    _show(lines, b" ", old[at_old:old_stop])
    old_count, new_count = old_stop - old_start, new_stop - new_start
    return Hunk(
        old_start + (old_count > 0),
        old_count,
        new_start + (new_count > 0),
        new_count,
        tuple(lines),
    )


def _show(shown: list[bytes], sign: bytes, lines: _Lines) -> None:
    for line in lines:
        shown.append(sign + line.removesuffix(b"\n"))
        if not line.endswith(b"\n"):
            shown.append(b"\\ No newline at end of file")
