"""Lines about what a server refused: one each, without control characters, and not too many."""

import io
import logging

from dmsync.engine.access import full_access
from dmsync.engine.refusals import note, note_refusal
from dmsync.surfaces.cli.server_log import BURST, RefusalFilter, log_refusals


def test_a_line_says_who_from_where_and_what() -> None:
    out = io.StringIO()
    log_refusals(out)
    note_refusal(full_access("bob"), "append", "alice", "app", "denied")
    note("refused", who="eve SHA256:x", source="::1", verb="login", why="no\nkey \x1b[31m\u202e")
    first, second = out.getvalue().splitlines()
    assert first.endswith("Z dm: refused user=bob verb=append dot=alice/app why=denied")
    assert "user=eve key=SHA256:x from=::1 verb=login" in second
    assert second.isprintable() and "\\x1b" in second and "\\x0a" in second


def test_a_flood_is_cut_and_counted() -> None:
    now_s = [0.0]
    rate = RefusalFilter(lambda: now_s[0])

    def passes() -> logging.LogRecord | None:
        record = logging.LogRecord("x", logging.WARNING, "", 0, "said %s", ("it",), None)
        return record if rate.filter(record) else None

    assert sum(passes() is not None for _ in range(1000)) == BURST
    now_s[0] = 1.5
    record = passes()
    assert record is not None and record.getMessage() == f"said it ({1000 - BURST} more before it)"
    assert passes() is None
