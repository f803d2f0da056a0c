"""Three-way merge of one entry, field by field."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Final, Literal, TypeVar

from dmsync.core.objects import XATTRS_MAX, Entry, EntryKind
from dmsync.core.pages import DIRECTORY, PageReader, differing_items

Side = Literal["ours", "theirs"]

_Value = TypeVar("_Value")
_PICKED: Final = ("mode", "uid", "gid")
_NO_VALUE: Final = object()
"""Equal to no value: what a field is in a base that does not exist."""


def same_metadata(one: Entry, other: Entry) -> bool:
    """Equal in all but times: mode, owner, attributes."""
    return (one.mode, one.uid, one.gid, one.xattrs) == (
        other.mode,
        other.uid,
        other.gid,
        other.xattrs,
    )


def is_unchanged(reader: PageReader, before: Entry | None, after: Entry | None) -> bool:
    """Whether nothing but times, link groups and the form of storage differs; directories with
    all that is below. Reads only pages that differ."""
    pending: list[tuple[Entry | None, Entry | None]] = [(before, after)]
    while pending:
        old, new = pending.pop()
        if old == new:
            continue
        if old is None or new is None:
            return False
        if not (old.same_data(new) and same_metadata(old, new)):
            return False
        if old.kind is EntryKind.DIRECTORY and old.tree != new.tree:
            was, now, _ = differing_items(reader, old.tree, new.tree, DIRECTORY)
            pending.extend(_paired(was, now))
    return True


def pick(base: object, ours: _Value, theirs: _Value) -> tuple[_Value, bool]:
    """The value of the side that changed it; (ours, False) when both did, differently."""
    if ours == theirs or theirs == base:
        return ours, True
    if ours == base:
        return theirs, True
    return ours, False


def merge_metadata(
    base: Entry | None, ours: Entry, theirs: Entry, data: Entry, favour: Side | None = None
) -> tuple[Entry, tuple[str, ...]]:
    """`data` (whose kind and content are decided) with metadata merged, and the fields that both
    sides changed differently: those keep ours', or the favoured side's.

    Times never conflict: the later wins. Link groups follow ours and are put right afterwards.
    """
    values: dict[str, object] = {}
    clashes = []
    for name in _PICKED:
        was = getattr(base, name) if base is not None else _NO_VALUE
        value, is_clear = pick(was, getattr(ours, name), getattr(theirs, name))
        if not is_clear:
            value = getattr(theirs if favour == "theirs" else ours, name)
            clashes.append(name)
        values[name] = value
    xattrs, is_clear = _merge_xattrs(base, ours, theirs, favour)
    if not is_clear:
        clashes.append("attributes")
    merged = replace(
        data,
        name=ours.name,
        mtime_ns=_merge_times(base, ours, theirs),
        hardlink=pick(base.hardlink if base else _NO_VALUE, ours.hardlink, theirs.hardlink)[0],
        xattrs=xattrs,
        extensions=pick(base.extensions if base else _NO_VALUE, ours.extensions, theirs.extensions)[
            0
        ],
        **values,  # type: ignore[arg-type]
    )
    if ours.same_data(theirs):
        was = base.sparse if base is not None else _NO_VALUE
        merged = replace(merged, sparse=pick(was, ours.sparse, theirs.sparse)[0])
    return merged, () if favour else tuple(clashes)


def _merge_times(base: Entry | None, ours: Entry, theirs: Entry) -> int:
    was = base.mtime_ns if base is not None else _NO_VALUE
    time_ns, is_clear = pick(was, ours.mtime_ns, theirs.mtime_ns)
    return time_ns if is_clear else max(ours.mtime_ns, theirs.mtime_ns)


def _merge_xattrs(
    base: Entry | None, ours: Entry, theirs: Entry, favour: Side | None
) -> tuple[tuple[tuple[bytes, bytes], ...], bool]:
    """Attributes merged key by key; False where a key was changed differently."""
    if ours.xattrs == theirs.xattrs:
        return ours.xattrs, True
    was, mine, other = (dict(e.xattrs) if e is not None else {} for e in (base, ours, theirs))
    merged: dict[bytes, bytes] = {}
    is_clear = True
    for key in sorted(was.keys() | mine.keys() | other.keys()):
        value, is_picked = pick(was.get(key), mine.get(key), other.get(key))
        if not is_picked:
            is_clear = False
            value = (other if favour == "theirs" else mine).get(key)
        if value is not None:
            merged[key] = value
    if len(merged) > XATTRS_MAX:
        return (theirs if favour == "theirs" else ours).xattrs, False
    return tuple(merged.items()), is_clear


def any_links(reader: PageReader, before: Entry | None, after: Entry | None) -> bool:
    """Whether any entry that differs between the two (directories with all below) is linked."""
    pending: list[tuple[Entry | None, Entry | None]] = [(before, after)]
    while pending:
        pair = pending.pop()
        if pair[0] == pair[1]:
            continue
        if any(entry is not None and entry.hardlink for entry in pair):
            return True
        trees = [e.tree if e and e.kind is EntryKind.DIRECTORY else None for e in pair]
        was, now, _ = differing_items(reader, trees[0], trees[1], DIRECTORY)
        pending.extend(_paired(was, now))
    return False


def _paired(was: Sequence[Entry], now: Sequence[Entry]) -> list[tuple[Entry | None, Entry | None]]:
    old = {entry.name: entry for entry in was}
    new = {entry.name: entry for entry in now}
    return [(old.get(name), new.get(name)) for name in old.keys() | new.keys()]
