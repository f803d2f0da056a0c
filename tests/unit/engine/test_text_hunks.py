"""Hunks: applied to the old text they give the new one; patch(1) agrees; any text in bounded time."""

import random
import subprocess
import time
from pathlib import Path

import pytest

from dmsync.engine.text_hunks import Hunk, is_text, text_hunks

NO_NEWLINE = b"\\ No newline at end of file"


def applied(old: bytes, hunks: list[Hunk]) -> bytes:
    """`old` with the hunks applied, every line of theirs checked against it."""
    lines = old.splitlines(keepends=True) if b"\r" not in old else old.split(b"\n")
    result: list[bytes] = []
    at = 0
    for hunk in hunks:
        start = hunk.old_start - (1 if hunk.old_count else 0)
        result += lines[at:start]
        at = start
        for number, line in enumerate(hunk.lines):
            if line == NO_NEWLINE:
                continue
            ends_open = hunk.lines[number + 1 : number + 2] == (NO_NEWLINE,)
            body = line[1:] + (b"" if ends_open else b"\n")
            if line[:1] != b"+":
                assert lines[at] == body
                at += 1
            if line[:1] != b"-":
                result.append(body)
    return b"".join([*result, *lines[at:]])


def random_text(source: random.Random, alphabet: bytes, length: int) -> bytes:
    return bytes(source.choice(alphabet) for _ in range(source.randrange(length)))


def edited(source: random.Random, text: bytes, alphabet: bytes) -> bytes:
    changed = bytearray(text)
    for _ in range(source.randrange(5)):
        at = source.randrange(len(changed) + 1)
        changed[at : at + source.randrange(4)] = random_text(source, alphabet, 4)
    return bytes(changed)


@pytest.mark.parametrize("alphabet", [b"ab\n", b"abcdefghij\n\n\n\n\n"])
def test_hunks_lead_from_the_old_text_to_the_new(alphabet: bytes) -> None:
    source = random.Random(7)
    for _ in range(3000):
        old = random_text(source, alphabet, 80)
        new = edited(source, old, alphabet) if source.random() < 0.5 else (
            random_text(source, alphabet, 80)
        )  # fmt: skip
        hunks = text_hunks(old, new, context=source.randrange(4))
        assert applied(old, hunks) == new
        assert (hunks == []) == (old == new)
        for hunk in hunks:
            signs = [line[:1] for line in hunk.lines]
            assert hunk.old_count == signs.count(b" ") + signs.count(b"-")
            assert hunk.new_count == signs.count(b" ") + signs.count(b"+")


def test_patch_understands_the_hunks(tmp_path: Path) -> None:
    old = b"".join(b"line %d\n" % number for number in range(60))
    new = old.replace(b"line 5\n", b"five\n").replace(b"line 40\n", b"") + b"last"
    hunks = text_hunks(old, new)
    assert [hunk.header() for hunk in hunks] == ["@@ -3,7 +3,7 @@", "@@ -38,7 +38,6 @@",
                                                 "@@ -58,3 +57,4 @@"]  # fmt: skip
    patch = b"--- f\n+++ f\n" + b"".join(
        hunk.header().encode() + b"\n" + b"".join(line + b"\n" for line in hunk.lines)
        for hunk in hunks
    )
    (tmp_path / "f").write_bytes(old)
    done = subprocess.run(
        ["git", "apply", "-p0", "-"], input=patch, cwd=tmp_path, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "f").read_bytes() == new


def test_a_moved_block_is_found_and_context_joins_near_changes() -> None:
    old = b"a\nb\nc\nd\ne\nf\ng\n"
    (hunk,) = text_hunks(old, b"a\nB\nc\nd\ne\nF\ng\n", context=2)
    assert hunk.lines == (b" a", b"-b", b"+B", b" c", b" d", b" e", b"-f", b"+F", b" g")
    assert len(text_hunks(old, b"a\nB\nc\nd\ne\nF\ng\n", context=1)) == 2
    assert text_hunks(old, b"", context=0)[0].header() == "@@ -1,7 +0,0 @@"


LONG = 150_000


@pytest.mark.parametrize("kind", ["two lines", "shuffled", "periods", "blank", "all other"])
def test_any_two_texts_are_compared_in_bounded_time(kind: str) -> None:
    source = random.Random(3)
    numbers = range(LONG)
    old, new = {
        "two lines": lambda: (
            b"".join(source.choice((b"a\n", b"b\n")) for _ in numbers),
            b"".join(source.choice((b"a\n", b"b\n")) for _ in numbers),
        ),
        "shuffled": lambda: (
            b"".join(b"%d\n" % n for n in source.sample(numbers, LONG)),
            b"".join(b"%d\n" % n for n in source.sample(numbers, LONG)),
        ),
        "periods": lambda: (
            b"".join(b"%d\n" % (n % 5) for n in numbers),
            b"".join(b"%d\n" % (n % 7) for n in numbers),
        ),
        "blank": lambda: (b"\n" * LONG, b"x\n" + b"\n" * (LONG // 2) + b"y\n"),
        "all other": lambda: (
            b"".join(b"%d\n" % n for n in numbers),
            b"".join(b"x%d\n" % n for n in numbers),
        ),
    }[kind]()
    began = time.process_time()
    hunks = text_hunks(old, new)
    assert time.process_time() - began < 10
    assert applied(old, hunks) == new


def test_what_is_text() -> None:
    assert is_text(b"") and is_text(b"plain\n") and is_text("grün ✓\n".encode())
    assert is_text(b"a latin-1 gr\xfcn line among others\n")
    assert not is_text(b"a\0b")
    assert not is_text(bytes(range(1, 32)) * 10)
    assert not is_text(bytes(range(128, 256)) * 10)
    cut = "✓".encode() * 4000  # 8192 bytes end inside a character
    assert is_text(cut) and is_text(cut[:8193])
    assert is_text(b"x" * 8192 + b"\0"), "only the beginning is looked at"
