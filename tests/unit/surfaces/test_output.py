import json

import pytest

from dmsync.surfaces.cli import output


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        (b"plain.txt", "plain.txt"),
        ("größe".encode(), "größe"),
        (b"two words", "two words"),
        (b"line\nbreak\tand\rreturn", "line\\nbreak\\tand\\rreturn"),
        (b"\x1b[31mred", "\\x1b[31mred"),
        (b"caf\xe9", "caf\\xe9"),
        (b"back\\slash", "back\\\\slash"),
        ("\x85next".encode(), "\\u0085next"),
        ("\u202eevil".encode(), "\\u202eevil"),
        ("\U000e0041tag".encode(), "\\U000e0041tag"),
        (b"nul\x00", "nul\\x00"),
        (b"\x7f", "\\x7f"),
    ],
)
def test_names_are_escaped_to_one_safe_line(name: bytes, shown: str) -> None:
    assert output.escape_name(name) == shown


def test_escaped_names_of_different_bytes_differ() -> None:
    assert output.escape_name(b"\\n") != output.escape_name(b"\n")
    assert output.escape_name(b"\\xe9") != output.escape_name(b"\xe9")


def test_text_keeps_newlines_but_no_other_control_character() -> None:
    assert output.escape_text("a\nb\tc\\d\x1b]0;x\x07\u2066") == "a\nb\tc\\d\\x1b]0;x\\x07\\u2066"


def test_json_of_a_path_has_exact_bytes_where_it_is_no_utf8() -> None:
    assert output.path_fields(b"ok") == {"path": "ok"}
    fields = output.path_fields(b"caf\xe9")
    assert fields == {"path": "caf\ufffd", "path_b64": "Y2Fm6Q=="}


def test_json_never_holds_raw_control_characters() -> None:
    text = output.json_text({"path": "\x1b\x9b\u202e", "fact": b"\xff", "ids": (1, 2)})
    assert text.isascii()
    assert text.isprintable()
    assert json.loads(text) == {"path": "\x1b\x9b\u202e", "fact": "ff", "ids": [1, 2]}


@pytest.mark.parametrize(
    ("size", "shown"),
    [
        (0, "-"),
        (3, "3 B"),
        (1024, "1.00 kiB"),
        (1024**2, "1.00 MiB"),
        (1536 * 1024**2, "1.50 GiB"),
        (5 * 1024**4, "5120.00 GiB"),
    ],
)
def test_sizes_are_shown_as_dotmesh_shows_them(size: int, shown: str) -> None:
    assert output.human_size(size) == shown


def test_dates_keep_their_offset_and_all_decimals() -> None:
    time_ns = 1_795_253_400 * 10**9 + 7
    assert output.human_date(time_ns, 0) == "Sat Nov 21 09:30:00 2026 +0000"
    assert output.human_date(time_ns, -210) == "Sat Nov 21 06:00:00 2026 -0330"
    assert output.iso_date(time_ns, 60) == "2026-11-21T10:30:00.000000007+01:00"


@pytest.mark.parametrize("time_ns", [-(2**63), 2**63 - 1])
def test_dates_of_any_stored_time_can_be_shown(time_ns: int) -> None:
    assert output.human_date(time_ns, 1440)
    assert output.iso_date(time_ns, -1440)


def test_table_pads_columns_and_leaves_nothing_trailing() -> None:
    assert list(output.table([("DOT", "SIZE"), ("longer", "-")])) == [
        "DOT     SIZE",
        "longer  -",
    ]


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0s"), (59, "59s"), (65, "1m05s"), (7260, "2h01m")]
)
def test_durations(seconds: float, shown: str) -> None:
    assert output.human_duration(seconds) == shown
