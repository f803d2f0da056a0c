"""Merge drivers: what can merge the content of one file, and the interface that others can meet.

A driver gets three versions of a file that both sides changed, and gives back one, or a conflict.
The first that claims the file decides: commands of the user's own configuration (never taken from
a remote), then SQLite databases by rows, then text by hunks. What nobody claims conflicts whole.
"""

import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Final, Protocol

from dmsync.core.ids import Kind
from dmsync.core.objects import Entry
from dmsync.core.pages import ZERO_RUN, file_spans
from dmsync.engine.driver_commands import DRIVER_TIMEOUT_S, claims_path, failed, run_driver
from dmsync.engine.file_content import ContentReader
from dmsync.engine.materialise import private_directory, write_content
from dmsync.engine.merging.entries import Side
from dmsync.engine.merging.text import TEXT_BYTES_MAX, is_text, merge_texts
from dmsync.engine.settings import DriverCommand, EngineSettings
from dmsync.errors import DriverFailed
from dmsync.storage.durable import storage_errors
from dmsync.storage.layout import Layout as StoreLayout
from dmsync.storage.pack_writer import PackWriter

if TYPE_CHECKING:
    from dmsync.engine.databases.sqlite_merge import RowConflict

ROW_CONFLICTS_MAX: Final = 10_000
_SQLITE_HEADER_BYTES: Final = 16
_REASON_MAX: Final = 1000
_MATERIALISED: Final = (b"-wal", b"-journal")
"""Companions a database needs to be read; `-shm` is made anew."""


@dataclass(frozen=True)
class FileVersion:
    """One side's file and, by their endings, the companions beside it."""

    entry: Entry
    companions: Mapping[bytes, Entry] = field(default_factory=dict)


@dataclass(frozen=True)
class FileMerge:
    """A file that both sides changed, at `path` from the dot's root."""

    path: bytes
    base: FileVersion
    ours: FileVersion
    theirs: FileVersion
    favour: Side | None = None


@dataclass(frozen=True)
class DriverResult:
    """What a driver made of it. `merged` is the content for the path, None to keep ours.

    `reason` is "" when nothing is left to decide, else why it conflicts: then `rows` are what is
    open in a database, and `marked` is a version to lie beside the path.
    """

    merged: Entry | None
    reason: str = ""
    rows: "tuple[RowConflict, ...]" = ()
    marked: Entry | None = None


class MergeDriver(Protocol):
    """Merges files of some format."""

    def merge(self, files: FileMerge, bench: "Bench") -> DriverResult | None:
        """The result, or None for a file that is not this driver's.

        Raises:
            DriverFailed: it is, and merging it failed; nothing may be concluded from that.
        """
        ...


class Bench:
    """Where drivers work: reads and stores file content, and has a private directory."""

    def __init__(self, layout: StoreLayout, writer: PackWriter) -> None:
        self.writer = writer
        self._layout = layout
        self._stack = ExitStack()
        self._directory: str | None = None
        self._count = 0

    def close(self) -> None:
        self._stack.close()

    def clear(self) -> None:
        """Remove what the last file left in our directories."""
        if self._directory is not None:
            for name in os.listdir(self._directory):
                shutil.rmtree(os.path.join(self._directory, name), ignore_errors=True)

    def new_directory(self) -> str:
        """An empty directory of our own, gone when the bench closes."""
        if self._directory is None:
            self._directory = self._stack.enter_context(private_directory(self._layout))
        self._count += 1
        path = os.path.join(self._directory, str(self._count))
        with storage_errors(f"making {path}"):
            os.mkdir(path, 0o700)
        return path

    def materialise(self, version: FileVersion, path: str) -> None:
        """Write a version's file to the new file `path`, its companions beside it."""
        write_content(self.writer, version.entry, path)
        for ending in _MATERIALISED:
            if ending in version.companions:
                write_content(self.writer, version.companions[ending], path + ending.decode())

    def stored(self, path: str, old: Entry) -> Entry:
        """Store the file at `path`: `old` with its content. Raises DriverFailed without one."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError as exc:
            raise DriverFailed("the merge driver wrote no result") from exc
        try:
            with ContentReader(self.writer, self.writer, incremental=True) as reader:
                content = reader.read(fd, os.fstat(fd), old)
        finally:
            os.close(fd)
        return replace(
            old,
            size=content.size,
            content=content.content,
            layout=content.layout,
            tree=content.tree,
            sparse=content.sparse,
        )

    def store_bytes(self, data: bytes, old: Entry) -> Entry:
        """Store `data` as the content of `old`."""
        path = os.path.join(self.new_directory(), "content")
        with storage_errors(f"writing {path}"), open(path, "xb") as file:
            file.write(data)
        return self.stored(path, old)

    def head(self, entry: Entry, length: int) -> bytes:
        """The first bytes of a file."""
        return b"".join(self._blocks(entry, length))[:length]

    def read(self, entry: Entry) -> bytes:
        """All bytes of a file: only for those whose size was looked at."""
        return b"".join(self._blocks(entry, entry.size))

    def _blocks(self, entry: Entry, length: int) -> Iterator[bytes]:
        for span in file_spans(self.writer, entry):
            if length <= 0:
                return
            if span.chunk == ZERO_RUN:
                yield bytes(min(span.length, length))
            else:
                yield self.writer.read(Kind.CHUNK, span.chunk)
            length -= span.length


@contextmanager
def open_bench(layout: StoreLayout, writer: PackWriter) -> Iterator[Bench]:
    bench = Bench(layout, writer)
    try:
        yield bench
    finally:
        bench.close()


def merge_drivers(settings: EngineSettings) -> tuple[MergeDriver, ...]:
    """All drivers, in the order in which they are asked."""
    commands = tuple(CommandDriver(command) for command in settings.merge_drivers)
    return (*commands, SqliteDriver(), TextDriver())


def merge_file(
    drivers: Sequence[MergeDriver], files: FileMerge, bench: Bench
) -> DriverResult | None:
    """What the first driver that claims the file makes of it; None when none does."""
    try:
        for driver in drivers:
            result = driver.merge(files, bench)
            if result is not None:
                return result
        return None
    finally:
        bench.clear()


# --- commands of the user --------------------------------------------------------------------


@dataclass(frozen=True)
class CommandDriver:
    """Runs a shell command with DM_BASE, DM_OURS, DM_THEIRS, DM_RESULT (paths) and DM_PATH.

    Exit 0: DM_RESULT is the merged file. 1: a conflict; DM_RESULT, if written, lies beside the
    path. Anything else, and taking too long, is a failure.
    """

    command: DriverCommand
    timeout_s: float = DRIVER_TIMEOUT_S

    def merge(self, files: FileMerge, bench: Bench) -> DriverResult | None:
        if not claims_path(self.command, files.path):
            return None
        directory = bench.new_directory()
        variables = {"DM_PATH": files.path}
        for side, version in (("base", files.base), ("ours", files.ours), ("theirs", files.theirs)):
            path = os.path.join(directory, side)
            bench.materialise(version, path)
            variables[f"DM_{side.upper()}"] = os.fsencode(path)
        result = os.path.join(directory, "result")
        variables["DM_RESULT"] = os.fsencode(result)
        run = run_driver(self.command, variables, directory=directory, timeout_s=self.timeout_s)
        if run.exit_status not in (0, 1):
            raise failed(self.command, run)
        if run.exit_status == 0:
            return DriverResult(bench.stored(result, files.ours.entry))
        marked = bench.stored(result, files.ours.entry) if os.path.lexists(result) else None
        return DriverResult(None, f"driver {self.command.name} found conflicts", marked=marked)


# --- SQLite ------------------------------------------------------------------------------------


class SqliteDriver:
    """Row by row, by primary key: engine/databases/sqlite_merge.py."""

    def merge(self, files: FileMerge, bench: Bench) -> DriverResult | None:
        from dmsync.engine.databases.sqlite_diff import is_sqlite
        from dmsync.engine.databases.sqlite_merge import merge_databases

        versions = {"base": files.base, "ours": files.ours, "theirs": files.theirs}
        if not all(
            is_sqlite(bench.head(version.entry, _SQLITE_HEADER_BYTES))
            for version in versions.values()
        ):
            return None
        directory = bench.new_directory()
        paths = {}
        for side, version in versions.items():
            os.mkdir(os.path.join(directory, side), 0o700)
            paths[side] = os.path.join(directory, side, "database")
            bench.materialise(version, paths[side])
        result = os.path.join(directory, "result")
        merged = merge_databases(
            **paths, result=result, favour=files.favour, conflicts_max=ROW_CONFLICTS_MAX
        )
        if merged.refused:
            # it may name a table or column, whose names need not be Unicode
            reason = merged.refused.encode("utf-8", "backslashreplace").decode()
            return DriverResult(None, reason[:_REASON_MAX])
        stored = bench.stored(result, files.ours.entry)
        if not merged.conflicts:
            return DriverResult(stored)
        count = len(merged.conflicts)
        reason = f"{count} row{'' if count == 1 else 's'} changed on both sides"
        return DriverResult(stored, reason, merged.conflicts)


# --- text --------------------------------------------------------------------------------------


class TextDriver:
    """By hunks of lines; see merging/text.py."""

    def merge(self, files: FileMerge, bench: Bench) -> DriverResult | None:
        versions = (files.base, files.ours, files.theirs)
        if any(v.companions or v.entry.size > TEXT_BYTES_MAX for v in versions):
            return None
        base, ours, theirs = (bench.read(version.entry) for version in versions)
        if not (is_text(base) and is_text(ours) and is_text(theirs)):
            return None
        merged = merge_texts(base, ours, theirs, files.favour)
        stored = bench.store_bytes(merged.data, files.ours.entry)
        if not merged.conflicts:
            return DriverResult(stored)
        count = merged.conflicts
        reason = f"{count} part{'' if count == 1 else 's'} of the text changed on both sides"
        return DriverResult(None, reason, marked=stored)
