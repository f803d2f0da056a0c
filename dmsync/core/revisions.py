"""The syntax of revisions, parsed into values (README, "Revisions"); engine/revision_lookup
resolves them.

HEAD  @  branch  tag  remote/branch  stash/name  id  @{-n}  :/text
X^  X^n  X~n  X@{n}  X@{time}  X@{u}  X^{}  X^{commit}  A..B  A...B
"""

import re
from datetime import UTC, datetime, tzinfo
from typing import Final

from dmsync.core.names import shown
from dmsync.core.values import plain_value_type
from dmsync.errors import UsageError

REVISION_CHARACTERS_MAX: Final = 1024
STEPS_MAX: Final = 256
COUNT_MAX: Final = 2**31 - 1
HEAD: Final = "HEAD"


@plain_value_type
class Parent:
    """`^n`: the n-th parent, 1 the first; 0 (also `^{}`, `^{commit}`) the commit itself."""

    number: int


@plain_value_type
class Ancestor:
    """`~n`: n times the first parent."""

    count: int


@plain_value_type
class ReflogEntry:
    """`@{n}`: where the ref was n changes ago; 0 is now."""

    index: int


@plain_value_type
class ReflogTime:
    """`@{time}`: where the ref was then; `time_of` turns the text into a time."""

    text: str


@plain_value_type
class Upstream:
    """`@{u}`: the remote branch that the branch follows."""


@plain_value_type
class BranchBefore:
    """`@{-n}`: the branch checked out n checkouts ago; only the first step after HEAD."""

    count: int


Step = Parent | Ancestor | ReflogEntry | ReflogTime | Upstream | BranchBefore


@plain_value_type
class Revision:
    """One commit: `base` is `HEAD`, `:/text` or a name or id as written, then steps from left to
    right."""

    base: str
    steps: tuple[Step, ...] = ()

    @property
    def message_text(self) -> str | None:
        """The text of `:/text`; None for any other base."""
        return self.base[2:] if self.base.startswith(_MESSAGE) else None

    @property
    def is_head(self) -> bool:
        return self.base == HEAD

    @property
    def id_prefix(self) -> str | None:
        """`base` in lower case when it may be an id or the beginning of one (4 hex or more)."""
        return self.base.lower() if _ID_PREFIX.fullmatch(self.base) else None


@plain_value_type
class Range:
    """`A..B`: what B has and A lacks. With `symmetric`, `A...B`: what only one of them has."""

    left: Revision
    right: Revision
    symmetric: bool = False


_MESSAGE: Final = ":/"
_BASE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_./-]*", re.ASCII)
_ID_PREFIX: Final = re.compile(r"[0-9a-fA-F]{4,64}", re.ASCII)
_STEP: Final = re.compile(
    r"\^(?P<itself>\{(?:commit)?\})|\^(?P<parent>[0-9]*)|~(?P<ancestor>[0-9]*)"
    r"|@\{(?P<inside>[^{}]*)\}",
    re.ASCII,
)
_BEFORE: Final = re.compile(r"-([0-9]+)", re.ASCII)
_AGO: Final = re.compile(
    r"([0-9]{1,9})[ .]?(second|minute|hour|day|week|month|year)s?[ .]ago", re.ASCII
)
_SECONDS: Final = {
    "second": 1,
    "minute": 60,
    "hour": 3600,
    "day": 86_400,
    "week": 604_800,
    "month": 30 * 86_400,
    "year": 365 * 86_400,
}


def _bad(text: str, why: str) -> UsageError:
    return UsageError(f"bad revision {shown(text)}: {why}")


def _count(text: str, digits: str) -> int:
    if len(digits) > 10 or int(digits) > COUNT_MAX:
        raise _bad(text, "the number is too large")
    return int(digits)


def _at_step(text: str, inside: str, *, is_first: bool) -> Step:
    if inside in ("u", "upstream"):
        return Upstream()
    before = _BEFORE.fullmatch(inside)
    if before is not None:
        count = _count(text, before[1])
        if not is_first or count == 0:
            raise _bad(text, "@{-1} and so on stand at the beginning, and count from 1")
        return BranchBefore(count)
    if not inside.strip():
        raise _bad(text, "nothing between the braces")
    if inside.isascii() and inside.isdigit():
        return ReflogEntry(_count(text, inside))
    check_time(inside)
    return ReflogTime(inside)


def parse_revision(text: str) -> Revision:
    """Parse one revision (no range, no path). Raises UsageError."""
    if len(text) > REVISION_CHARACTERS_MAX:
        raise _bad(text, "it is too long")
    if text.startswith(_MESSAGE):
        return _parse_message(text)
    base, position = _parse_base(text)
    steps: list[Step] = []
    while position < len(text):
        match = _STEP.match(text, position)
        if match is None or len(steps) >= STEPS_MAX:
            raise _bad(text, f"cannot read {shown(text[position:])}")
        if match["itself"] is not None:
            steps.append(Parent(0))
        elif match["parent"] is not None:
            steps.append(Parent(_count(text, match["parent"] or "1")))
        elif match["ancestor"] is not None:
            steps.append(Ancestor(_count(text, match["ancestor"] or "1")))
        else:
            steps.append(_at_step(text, match["inside"], is_first=position == 0))
        position = match.end()
    return Revision(base, tuple(steps))


def _parse_message(text: str) -> Revision:
    if not text.removeprefix(_MESSAGE).strip():
        raise _bad(text, "no text to look for")
    return Revision(text)


def _parse_base(text: str) -> tuple[str, int]:
    """(base, where the steps begin). `@` is HEAD, and `@{...}` alone is about HEAD."""
    if text.startswith("@{"):
        return HEAD, 0
    if text.startswith("@"):
        return HEAD, 1
    match = _BASE.match(text)
    if match is None:
        raise _bad(text, "it begins with no name or id" if text else "it is empty")
    base = match.group()
    if ".." in base or "//" in base or base.endswith(("/", ".")):
        raise _bad(text, f"{shown(base)} is no name")
    return base, match.end()


def parse_revision_or_range(text: str) -> Revision | Range:
    """Parse a revision, `A..B` or `A...B`; a side left out is HEAD. Raises UsageError.

    All that follows `:/` is text to look for: it has no range.
    """
    if text.startswith(_MESSAGE):
        return parse_revision(text)
    at = _outside_braces(text, "..")
    if at < 0:
        return parse_revision(text)
    symmetric = text.startswith("...", at)
    left, right = text[:at], text[at + (3 if symmetric else 2) :]
    if not left and not right:
        raise _bad(text, "a range needs at least one end")
    return Range(parse_revision(left or HEAD), parse_revision(right or HEAD), symmetric)


def split_path(text: str) -> tuple[Revision, str]:
    """Parse `REV:PATH`; an empty PATH is the whole tree, an empty REV is HEAD. Raises UsageError.

    The first colon ends REV, so `:/text` cannot be one here.
    """
    at = _outside_braces(text, ":")
    if at < 0:
        raise _bad(text, "expected REVISION:PATH")
    return parse_revision(text[:at] or HEAD), text[at + 1 :]


def _outside_braces(text: str, wanted: str) -> int:
    """Index of the first `wanted` that is not within `{}`, or -1."""
    depth = 0
    for index, character in enumerate(text):
        if character == "{":
            depth += 1
        elif character == "}":
            depth -= 1
        elif depth <= 0 and text.startswith(wanted, index):
            return index
    return -1


def check_time(text: str) -> None:
    """Raise UsageError unless `time_of` understands `text`."""
    time_of(text, now_ns=0, zone=UTC)


def time_of(text: str, *, now_ns: int, zone: tzinfo) -> int:
    """Nanoseconds since 1970 UTC of a time as users write it.

    ISO 8601 (`2026-11-21`, `2026-11-21 09:30`, with or without offset; without one it is in
    `zone`), `now`, `yesterday`, or `2 hours ago` (also `2.hours.ago`; a month is 30 days).

    Raises:
        UsageError: not understood.
    """
    plain = text.strip().lower()
    if plain == "now":
        return now_ns
    ago = _AGO.fullmatch("1 day ago" if plain == "yesterday" else plain)
    if ago is not None:
        return now_ns - int(ago.group(1)) * _SECONDS[ago.group(2)] * 1_000_000_000
    try:
        moment = datetime.fromisoformat(text.strip())
    except ValueError as exc:
        raise UsageError(f"cannot read the time {shown(text)}") from exc
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=zone)
    since = moment - datetime(1970, 1, 1, tzinfo=UTC)
    return (since.days * 86_400 + since.seconds) * 1_000_000_000 + since.microseconds * 1000
