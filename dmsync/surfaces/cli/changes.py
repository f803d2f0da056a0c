"""How changes between two trees are printed: `+`, `-`, `*`, `R` for renamed, `C` for copied."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from dmsync.surfaces.cli import output

if TYPE_CHECKING:
    from dmsync.core.objects import Entry
    from dmsync.engine.differences import Change

KIND_WORDS: Final = (
    "file", "directory", "symlink", "fifo", "character device", "block device",
)  # fmt: skip
"""By EntryKind."""


def change_line(change: "Change", *, stat: bool = False, differing_bytes: int | None = None) -> str:
    """One change on one line: `R old -> new` for a rename; sizes with `stat`, and how many bytes
    differ at most where that is known and less than the whole file."""
    name = output.escape_name(change.path)
    if change.old_path is not None:
        name = f"{output.escape_name(change.old_path)} -> {name}"
    if not stat:
        return f"{change.kind} {name}"
    return f"{change.kind} {name} ({_sizes(change)}{_differing(change, differing_bytes)})"


def _sizes(change: "Change") -> str:
    if change.kind == "C":
        return _text(_size(change.new))
    if change.metadata_only:
        return "metadata"
    match change.kind:
        case "+":
            return _text(_size(change.new))
        case "-":
            return _text(_size(change.old))
        case _:
            return f"{_text(_size(change.old))} -> {_text(_size(change.new))}"


def _differing(change: "Change", differing_bytes: int | None) -> str:
    if differing_bytes is None or change.kind != "*" or change.metadata_only:
        return ""
    if differing_bytes >= _whole(change):
        return ""
    return f", at most {_text(differing_bytes)} differ"


def _whole(change: "Change") -> int:
    return max(_size(change.old), _size(change.new))


def _size(entry: "Entry | None") -> int:
    return 0 if entry is None else entry.size


def _text(size: int) -> str:
    return output.human_size(size) if size else "0 B"


def stat_line(changes: Sequence["Change"], differing_bytes: int | None = None) -> str:
    """The closing line of --stat."""
    counts = dict.fromkeys("+-*RC", 0)
    for change in changes:
        counts[change.kind] += 1
    words = (
        ("+", "added"),
        ("-", "removed"),
        ("*", "changed"),
        ("R", "renamed"),
        ("C", "copied"),
    )
    told = [f"{counts[kind]} {word}" for kind, word in words if counts[kind]]
    growth = sum(_growth(change) for change in changes)
    sign = "-" if growth < 0 else "+"
    line = f"{', '.join(told) or 'no changes'}; {sign}{_text(abs(growth))}"
    whole = sum(_whole(change) for change in changes if not change.metadata_only)
    if differing_bytes is None or differing_bytes >= whole:
        return line
    return f"{line}; at most {_text(differing_bytes)} differ"


def _growth(change: "Change") -> int:
    was = 0 if change.kind == "C" else _size(change.old)  # the copied file is still there
    return _size(change.new) - was


def status_line(change: "Change") -> str:
    """One change for scripts: kind and path, or kind, old path and path, between tabs."""
    names = [change.path] if change.old_path is None else [change.old_path, change.path]
    return "\t".join([change.kind, *map(output.escape_name, names)])


def metadata_lines(change: "Change") -> list[str]:
    """What differs besides the content, in words: `mode 0644 -> 0755`."""
    lines = []
    for what, was, now in _metadata(change):
        if was is None or now is None:
            lines.append(f"{what} {'added' if was is None else 'removed'}")
        elif was == now:
            lines.append(f"{what} changed")
        else:
            lines.append(f"{what} {was} -> {now}")
    return lines


def metadata_fields(change: "Change") -> dict[str, list[str | None]]:
    """JSON of the same: what differs, and its two values."""
    return {what: [was, now] for what, was, now in _metadata(change)}


def _metadata(change: "Change") -> list[tuple[str, str | None, str | None]]:
    """(what, old, new) of all that differs; of attributes only that, values being any bytes."""
    old, new = change.old, change.new
    if old is None or new is None or change.kind == "C":
        return []
    found: list[tuple[str, str | None, str | None]] = []
    if old.kind is not new.kind:
        found.append(("kind", KIND_WORDS[old.kind], KIND_WORDS[new.kind]))
    if old.mode != new.mode:
        found.append(("mode", f"{old.mode:04o}", f"{new.mode:04o}"))
    if (old.uid, old.gid) != (new.uid, new.gid):
        found.append(("owner", f"{old.uid}:{old.gid}", f"{new.uid}:{new.gid}"))
    if old.mtime_ns != new.mtime_ns and old.kind != 1:  # a directory's follows what happens inside
        found.append(("time", output.iso_date(old.mtime_ns), output.iso_date(new.mtime_ns)))
    if old.hardlink != new.hardlink:
        found.append(("link group", _group(old), _group(new)))
    was, now = dict(old.xattrs), dict(new.xattrs)
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            what = f"attribute {output.escape_name(name)}"
            found.append((what, _value(was.get(name)), _value(now.get(name))))
    return found


def _value(attribute: bytes | None) -> str | None:
    return None if attribute is None else f"{len(attribute)} bytes"


def _group(entry: "Entry") -> str:
    return output.escape_name(entry.hardlink) if entry.hardlink else "none"


def kind_lines(change: "Change", *, told: bool) -> list[str]:
    """What there is to say of a path that is no regular file, or was none: link targets, and
    kinds, unless they are `told` with the metadata."""
    old, new = change.old, change.new
    lines = []
    if not told and old is not None and new is not None and old.kind is not new.kind:
        lines.append(f"{KIND_WORDS[old.kind]} -> {KIND_WORDS[new.kind]}")
    was = old.link_target if old is not None else b""
    now = new.link_target if new is not None else b""
    if was and now and was != now:
        lines.append(f"symlink to {output.escape_name(was)} -> {output.escape_name(now)}")
    elif was != now:
        sign = "+" if now else "-"
        lines.append(f"{sign} symlink to {output.escape_name(now or was)}")
    return lines


def change_fields(change: "Change") -> dict[str, object]:
    """JSON of one change."""
    fields: dict[str, object] = {"change": change.kind, **output.path_fields(change.path)}
    if change.old_path is not None:
        fields.update(output.path_fields(change.old_path, "old_path"))
    fields["old_size"] = _size(change.old)
    fields["new_size"] = _size(change.new)
    fields["metadata_only"] = change.metadata_only
    return fields
