"""What tools/bench keeps and says: verdicts, the JSON file, the page and the README's section."""

import json
from pathlib import Path

import pytest

from tools.benchmarks import report
from tools.benchmarks.measuring import Cost, rotated
from tools.benchmarks.peers import stages_of
from tools.benchmarks.result import (
    Check,
    Result,
    RowResult,
    load_result,
    new_result,
    with_unit,
)


def a_result(directory: Path) -> Result:
    result = new_result(
        {"cpu": "a cpu", "cores": 2, "memory_mib": 4096, "filesystem": "ext4", "system": "Debian"},
        dict.fromkeys(("dm", "restic", "borg", "git", "bup", "rsync"), "1.0"),
        {"runs": 3, "quick": False},
        directory,
    )
    row = RowResult("first-commit", "First commit", runs=3)
    for wall_s in (1.0, 3.0, 2.0):
        row.add("first commit", "dm", Cost(wall_s, stages={"hash": wall_s / 2}))
        row.add("first commit", "restic", Cost(2 * wall_s).with_more(stored_bytes=1000))
    row.series["seconds"] = [(1, 0.5), (2, 0.75)]
    row.compare("first commit", "wall_s", "restic", 0.4)
    result.rows[row.name] = row
    return result


@pytest.mark.parametrize(
    ("check", "verdict"),
    [
        (Check("a", 0.5, "x", 0.5), "holds"),
        (Check("a", 0.75, "x", 0.5), "misses by 50 %"),
        (Check("a", 80, "entries/s", 100, at_least=True), "misses by 20 %"),
        (Check("a", 100, "entries/s", 100, at_least=True), "holds"),
        (Check("a", 1, "files", 0), "misses"),
        (Check("a", 9, "x", None), "beside"),
    ],
)
def test_a_check_says_whether_it_holds_or_by_how_much_it_misses(check: Check, verdict: str) -> None:
    assert check.verdict == verdict


def test_medians_are_compared_and_the_slowest_run_keeps_its_stages(tmp_path: Path) -> None:
    row = a_result(tmp_path).rows["first-commit"]
    assert row.median("first commit", "dm", "wall_s") == 2.0
    assert row.median("first commit", "restic", "stored_bytes") == 1000
    assert row.checks[0].value == 0.5
    assert row.checks[0].verdict == "misses by 25 %"
    assert row.stages == {"first commit": {"hash": 1.5}}


def test_a_result_comes_back_from_its_file(tmp_path: Path) -> None:
    result = a_result(tmp_path / "results")
    result.save()
    again = load_result(result.path)
    assert again == result
    assert list(result.path.parent.iterdir()) == [result.path], "nothing else is left behind"


def test_a_file_of_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    path.write_text(json.dumps({"samples": []}))
    with pytest.raises(ValueError, match="format"):
        load_result(path)


def test_the_page_holds_every_check_sample_and_version(tmp_path: Path) -> None:
    page = report.page(a_result(tmp_path), [])
    assert "| **First commit** | first commit: time against restic | 2.00 s | 4.00 s |" in page
    assert "**misses by 25 %**" in page
    assert "0 of 1 figures hold their targets" in page
    assert "| first commit | hash |" not in page, "stages have a table of their own"
    assert "| First commit | first commit | 1.50 |" in page
    assert "- bup: 1.0" in page


def test_the_page_says_whether_its_rows_come_from_one_run(tmp_path: Path) -> None:
    result = a_result(tmp_path)
    result.rows["start"] = RowResult("start", "Start")
    unknown = "Whether all rows come from one run the result does not say."
    assert unknown in report.page(result, [])
    for row in result.rows.values():
        row.run, row.dm = "2001-01-01T10:00:00+0000", "0.1 (aaa)"
    assert "All rows come from one run." in report.page(result, [])
    result.rows["start"].run, result.rows["start"].dm = "2001-01-01T12:00:00+0000", "0.1 (bbb)"
    assert "The rows come from 2 runs of dm 0.1 (aaa), 0.1 (bbb)." in report.page(result, [])
    result.machine["conditions"] = "a test ran beside"
    page = report.page(result, [])
    assert "2 runs of dm 0.1 (aaa), 0.1 (bbb). Conditions: a test ran beside." in page


def test_a_row_that_failed_is_told_and_not_left_out(tmp_path: Path) -> None:
    result = a_result(tmp_path)
    result.rows["start"] = RowResult("start", "Start", error="RuntimeError: no dm")
    assert "| **Start** | not measured | | | | | RuntimeError: no dm |" in report.page(result, [])


def test_the_history_holds_full_results_of_this_format_only(tmp_path: Path) -> None:
    partial = a_result(tmp_path)
    partial.save()
    (tmp_path / "2000-old.json").write_text(json.dumps({"samples": []}))
    full = a_result(tmp_path)
    full.path = tmp_path / "2001-full.json"
    for number in range(report.ROWS_COUNT_MIN):
        full.rows[f"row{number}"] = RowResult(f"row{number}", "Row")
    full.save()
    history = report.complete_results(tmp_path)
    assert [result.path.name for result in history] == ["2001-full.json"]
    assert "| 2001-full.json | 1.0 | 0 of 1 figures hold" in report.page(partial, [], history)


def test_only_the_marked_section_of_the_readme_is_replaced(tmp_path: Path) -> None:
    readme = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    section = report.readme_section(a_result(tmp_path))
    changed = report.with_section(readme, section)
    assert changed == f"before\n{report.BEGIN}\n{section}\n{report.END}\nafter\n"
    assert "| first commit, 1 GB of PostgreSQL | **2.00 s** | 4.00 s |" in section
    with pytest.raises(ValueError, match="no place"):
        report.with_section("no marks", section)


def test_the_readme_says_where_figures_are_of_fewer_runs(tmp_path: Path) -> None:
    result = a_result(tmp_path)
    result.options["runs"] = 5
    assert "medians of 5 (of fewer in 1 long rows)" in report.readme_section(result)
    result.rows["first-commit"].runs = 5
    assert "medians of 5 on" in report.readme_section(result)


def test_the_project_s_readme_has_a_place_for_figures() -> None:
    text = report.README.read_text()
    assert report.BEGIN in text
    assert report.END in text


def test_figures_are_told_in_units_that_people_read() -> None:
    figures = {
        (512, "bytes"): "512 B",
        (1_234_567, "bytes"): "1.23 MB",
        (0, "bytes"): "0 B",
        (0.0123, "s"): "12.3 ms",
        (12.345, "s"): "12.35 s",
        (0.5, "x"): "0.50 x",
        (150_000, "entries/s"): "150 000 entries/s",
    }
    assert {key: with_unit(*key) for key in figures} == figures


def test_nobody_always_comes_first() -> None:
    assert [rotated("abc", number)[0] for number in range(4)] == ["a", "b", "c", "a"]
    assert rotated([], 3) == []


def test_stages_come_from_summaries_that_have_them() -> None:
    assert stages_of({}) == {}
    assert stages_of({"stages": {"hash": {"seconds": 1.5, "calls": 3}}}) == {"hash": 1.5}
    assert stages_of({"stages": {"hash": 2}}) == {"hash": 2.0}
