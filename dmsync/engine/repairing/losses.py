"""What a repair could not put back, named until somebody accepts it (decisions/0012).

`damaged/lost` has one JSON object a line. It is text for people as well: nothing but fsck reads it.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Protocol

from dmsync.storage.durable import (
    make_directory_durable,
    remove_if_there,
    storage_errors,
    write_file_atomic,
)
from dmsync.storage.layout import Layout


class Report(Protocol):
    """Told what is done."""

    def did(self, dot: str, where: str, message: str) -> None: ...


@dataclass(frozen=True)
class Loss:
    """One thing. `dot` is an id in hex and `name` what it was called, or both empty; `where` a ref,
    "commit", or what else it was; `commit` in hex, or empty; `origin` that of the ref."""

    dot: str
    name: str
    where: str
    commit: str
    why: str
    origin: str | None = None


def read_losses(layout: Layout) -> list[Loss]:
    """Oldest first. A line that is none is a loss whose name is not known any more.

    Raises:
        StorageFailed
    """
    with storage_errors(f"reading {layout.losses_file}"):
        try:
            with open(layout.losses_file, encoding="utf-8", errors="replace") as file:
                lines = file.read().splitlines()
        except FileNotFoundError:
            return []
    return [_parsed(line) for line in lines if line.strip()]


def _parsed(line: str) -> Loss:
    try:
        value = json.loads(line)
        texts = {field.name: value[field.name] for field in fields(Loss)}
        if all(type(text) is str or text is None for text in texts.values()):
            return Loss(**texts)
    except (ValueError, TypeError, KeyError, RecursionError):
        pass
    return Loss("", "", "damaged/lost", "", f"cannot be read: {line[:100]}")


def write_losses(layout: Layout, losses: Iterable[Loss]) -> None:
    """Make these, each once, what is lost; durable on return. Raises StorageFull, StorageFailed."""
    lines = [json.dumps(asdict(loss)) + "\n" for loss in dict.fromkeys(losses)]
    if lines:
        make_directory_durable(os.path.dirname(layout.losses_file))
        write_file_atomic(layout.losses_file, "".join(lines).encode())
        return
    with storage_errors(f"removing {layout.losses_file}"):
        remove_if_there(layout.losses_file)


def add_losses(layout: Layout, losses: Iterable[Loss]) -> None:
    """Raises StorageFull, StorageFailed."""
    known = read_losses(layout)
    added = [loss for loss in losses if loss not in known]
    if added:
        write_losses(layout, [*known, *added])


def accept_losses(layout: Layout, report: Report, *, dry_run: bool) -> None:
    """Their owner knows: no more is said of them. Raises StorageFailed."""
    for loss in read_losses(layout):
        at = f" at {loss.commit[:12]}" if loss.commit else ""
        report.did(loss.name, loss.where, f"accepted as lost{at}: {loss.why}")
    if not dry_run:
        write_losses(layout, ())
