"""Merges texts by hunks: what both sides changed in different places goes together."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from dmsync.engine.merging.entries import Side
from dmsync.engine.text_hunks import Match, matching_lines

TEXT_BYTES_MAX: Final = 8 * 1024 * 1024
_OURS: Final = b"<<<<<<< ours\n"
_BASE: Final = b"||||||| base\n"
_DIVIDER: Final = b"=======\n"
_THEIRS: Final = b">>>>>>> theirs\n"


@dataclass(frozen=True, slots=True)
class MergedText:
    """`data` is the result, or with `conflicts` the text with each of them marked."""

    data: bytes
    conflicts: int


def is_text(data: bytes) -> bool:
    """Valid UTF-8 without NUL, of at most TEXT_BYTES_MAX."""
    if len(data) > TEXT_BYTES_MAX or b"\0" in data:
        return False
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


class _Matcher:
    """What merge3 compares with: the engine's own comparison, which is bounded in time."""

    def __init__(
        self,
        isjunk: object = None,
        a: Sequence[bytes] = (),
        b: Sequence[bytes] = (),
        autojunk: bool = True,
    ) -> None:
        self._old = list(a)
        self._new = list(b)

    def get_matching_blocks(self) -> list[Match]:
        """Ascending runs of equal lines, ended by an empty one behind both texts."""
        return [*matching_lines(self._old, self._new), (len(self._old), len(self._new), 0)]


def merge_texts(base: bytes, ours: bytes, theirs: bytes, favour: Side | None = None) -> MergedText:
    """Three-way merge by lines; `favour` decides where both sides changed the same lines."""
    from merge3 import Merge3

    texts = [data.splitlines(keepends=True) for data in (base, ours, theirs)]
    merged: list[bytes] = []
    conflicts = 0
    for region in Merge3(texts[0], texts[1], texts[2], sequence_matcher=_Matcher).merge_regions():
        kind, *at = region
        bounds = [int(bound or 0) for bound in at]
        if kind != "conflict":
            source = {"unchanged": 0, "same": 1, "a": 1, "b": 2}[kind]
            merged += texts[source][bounds[0] : bounds[1]]
            continue
        versions = [text[bounds[2 * n] : bounds[2 * n + 1]] for n, text in enumerate(texts)]
        if favour is not None:
            merged += versions[1 if favour == "ours" else 2]
            continue
        conflicts += 1
        merged += _marked(*versions)
    return MergedText(b"".join(merged), conflicts)


def _marked(base: list[bytes], ours: list[bytes], theirs: list[bytes]) -> Iterator[bytes]:
    for mark, lines in ((_OURS, ours), (_BASE, base), (_DIVIDER, theirs)):
        yield mark
        yield from lines
        if lines and not lines[-1].endswith(b"\n"):
            yield b"\n"
    yield _THEIRS
