import pytest

from dmsync.core.durations import parse_duration, parse_grace
from dmsync.errors import UsageError

HOUR_NS = 3600 * 1_000_000_000


@pytest.mark.parametrize(
    ("text", "hours"),
    [("36h", 36), ("2d", 48), ("1w", 168), ("1m", 720), ("1y6m", 365 * 24 + 6 * 720)],
)
def test_durations(text: str, hours: int) -> None:
    assert parse_duration(text) == hours * HOUR_NS


@pytest.mark.parametrize("text", ["", "5", "h", "-1h", "1.5h", "1 h", "1s", "9999999d", "１h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_duration(text)


def test_a_grace_is_a_duration_or_none_at_all() -> None:
    """`m` is a month here as in `prune --keep-within`: a month taken for a minute ends undo."""
    assert parse_grace("6m") == parse_duration("6m") == 6 * 720 * HOUR_NS
    assert parse_grace("0") == 0
    for text in ("0s", "90s", "-0"):
        with pytest.raises(UsageError):
            parse_grace(text)
