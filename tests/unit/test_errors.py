"""Errors, their page in protocol/ and the README's exit codes say the same."""

import re
import tomllib
from pathlib import Path

import pytest

from dmsync import errors
from dmsync.surfaces.cli.commit import WARNINGS_EXIT
from dmsync.surfaces.cli.entry import INTERRUPTED_EXIT

ROOT = Path(__file__).parent.parent.parent


def error_classes() -> list[type[errors.DmError]]:
    """DmError and everything below it that dmsync.errors defines."""
    found = [errors.DmError]
    for cls in found:
        found += [below for below in cls.__subclasses__() if below.__module__ == errors.__name__]
    return found


def listed() -> dict[str, dict[str, object]]:
    with open(ROOT / "protocol" / "errors.toml", "rb") as file:
        return tomllib.load(file)


def test_codes_are_distinct() -> None:
    codes = [cls.code for cls in error_classes()]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("cls", error_classes(), ids=lambda cls: cls.__name__)
def test_every_error_is_listed_as_it_is(cls: type[errors.DmError]) -> None:
    entry = listed()[cls.code]
    assert (entry["exit_code"], entry["retryable"]) == (cls.exit_code, cls.retryable)


def test_everything_listed_is_an_error_with_a_meaning_of_one_line() -> None:
    entries = listed()
    assert entries.keys() == {cls.code for cls in error_classes()}
    for code, entry in entries.items():
        assert entry.keys() == {"exit_code", "retryable", "meaning"}, code
        meaning = entry["meaning"]
        assert isinstance(meaning, str) and meaning and "\n" not in meaning, code


def test_readme_lists_the_exit_codes_in_use() -> None:
    text = (ROOT / "README.md").read_text()
    paragraph = re.search(r"\*\*Exit codes\*\*: (.*?)\n\n", text, re.DOTALL)
    assert paragraph is not None
    clauses = " ".join(paragraph[1].split()).split("; ")
    told = {int(match[1]) for clause in clauses if (match := re.match(r"(\d+) \w", clause))}
    used = {0, WARNINGS_EXIT, INTERRUPTED_EXIT} | {cls.exit_code for cls in error_classes()}
    assert told == used
