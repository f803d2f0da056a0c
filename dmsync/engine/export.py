"""Export: a commit's tree, or a part of it, as a directory or a tar archive outside the store."""

import gzip
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import IO, Final

import zstandard

from dmsync.core.ids import DotId, ObjectId
from dmsync.core.objects import ROOT_ENTRY, Commit, Entry, EntryKind
from dmsync.core.pages import find_path, walk_tree
from dmsync.core.revisions import Revision, split_path
from dmsync.engine.progress import Progress
from dmsync.engine.restore import restore_tree
from dmsync.engine.revision_lookup import commit_named
from dmsync.engine.safe_files import remove_tree, shown, temporary_name
from dmsync.engine.store import Store
from dmsync.engine.tar_stream import TarStream
from dmsync.engine.tree_bounds import check_extent
from dmsync.errors import (
    AlreadyExists,
    NotFound,
    PathNotFound,
    StorageFailed,
    UsageError,
    WouldLose,
)
from dmsync.storage.catalog import DotRow
from dmsync.storage.durable import fsync_directory, storage_errors, whole_file

STDOUT: Final = b"-"
_ARCHIVE_SUFFIXES: Final = (b".tar", b".tar.zst", b".tar.gz")
_ZSTD_LEVEL: Final = 3
_GZIP_LEVEL: Final = 6
_FILE_MODE: Final = 0o666
"""Less the umask: an archive is a file like others."""


@dataclass(frozen=True)
class ExportRequest:
    """What a user asks of `dm export`. `place` is `REV[:PATH]`; `destination` a directory, a file
    ending .tar, .tar.zst or .tar.gz, or STDOUT, which then is written to `stream`.

    `force`: what the destination holds goes. `trusted` applies to directories alone; an archive
    records everything.
    """

    place: str
    destination: bytes
    stream: IO[bytes] | None = None
    force: bool = False
    trusted: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class ExportSummary:
    """`files` counts the names that are no directories, `bytes_written` their content: what was
    written, or would be with a dry run."""

    commit: ObjectId
    path: bytes
    files: int
    bytes_written: int
    withheld: tuple[bytes, ...] = ()
    unapplied: tuple[bytes, ...] = ()


def is_archive(destination: bytes) -> bool:
    """Whether this destination stands for a tar archive."""
    return destination == STDOUT or destination.endswith(_ARCHIVE_SUFFIXES)


def holds_something(destination: bytes) -> bool:
    """Whether it takes `force` to write there. Raises StorageFailed."""
    if destination == STDOUT or not os.path.lexists(destination):
        return False
    if is_archive(destination) or not os.path.isdir(destination):
        return True
    with storage_errors(f"reading {shown(destination)}"):
        return bool(os.listdir(destination))


def export(
    store: Store, dot: DotRow, request: ExportRequest, progress: Progress | None = None
) -> ExportSummary:
    """Write what `REV[:PATH]` holds; durable on return, and a kill leaves no part of it under the
    name of an archive or of a new directory.

    Raises:
        RevisionNotFound, PathNotFound: nothing of that name; a single file as a directory.
        AlreadyExists: the destination holds something and `force` was not given.
        WouldLose: the destination is a working tree or the store, or holds one.
        NotFound: the directory it is to be made in does not exist. ContentAbsent. StorageFull,
            StorageFailed.
    """
    revision, path = _split(request.place)
    commit_id = commit_named(store, dot, revision)
    commit = store.commit(dot.dot, commit_id)
    entry = find_path(store.objects(dot.dot), store.root(dot.dot, commit_id), path)
    if entry is None:
        raise PathNotFound(
            f"no path {shown(path)} in {revision.base}",
            hint=f"dm ls {revision.base}: lists what there is",
        )
    if request.destination != STDOUT:
        _check_destination(store, request)
    if entry.kind is not EntryKind.DIRECTORY and not is_archive(request.destination):
        raise PathNotFound(
            f"{shown(path)} is no directory",
            hint=f"dm cat {request.place} prints a file; a tar archive may hold a single one",
        )
    if entry.kind is EntryKind.DIRECTORY:
        check_extent(store.objects(dot.dot), entry.tree)
    if request.dry_run:
        return _measured(store, dot.dot, commit_id, path, entry)
    if not is_archive(request.destination):
        return _export_directory(store, dot.dot, request, commit_id, commit.root, path, progress)
    with _archive(request) as write:
        tar = _write_archive(store, dot.dot, write, commit, path, entry, progress)
    return ExportSummary(commit_id, path, tar.files, tar.bytes_written)


def _split(place: str) -> tuple[Revision, bytes]:
    """`REV:PATH`, or a revision alone. Raises UsageError."""
    try:
        revision, path = split_path(place)
    except UsageError:
        revision, path = split_path(f"{place}:")
    return revision, path.encode("utf-8", "surrogateescape").strip(b"/")


def _measured(
    store: Store, dot: DotId, commit: ObjectId, path: bytes, entry: Entry
) -> ExportSummary:
    if entry.kind is not EntryKind.DIRECTORY:
        return ExportSummary(commit, path, 1, entry.size)
    files = size = 0
    for _, below in walk_tree(store.objects(dot), entry):
        files += below.kind is not EntryKind.DIRECTORY
        size += below.size
    return ExportSummary(commit, path, files, size)


# --- where it goes -------------------------------------------------------------------------------


def _check_destination(store: Store, request: ExportRequest) -> None:
    destination = request.destination
    if not destination or b"\0" in destination:
        raise UsageError("the destination is no file name")
    above = os.path.dirname(os.path.abspath(destination))
    if not os.path.isdir(above):
        raise NotFound(f"no directory {shown(above)}", hint="make it first")
    if os.path.isdir(destination) and is_archive(destination):
        raise AlreadyExists(f"{shown(destination)} is a directory")
    if os.path.lexists(destination) and not os.path.isdir(destination):
        if not is_archive(destination):
            raise AlreadyExists(
                f"{shown(destination)} is no directory",
                hint="archives end .tar, .tar.zst or .tar.gz",
            )
        if os.path.exists(destination) and not os.path.isfile(destination):
            raise AlreadyExists(f"{shown(destination)} is no regular file")
    _refuse_own(store, destination)
    if not request.force and holds_something(destination):
        raise AlreadyExists(
            f"{shown(destination)} exists"
            if is_archive(destination)
            else f"{shown(destination)} is not empty",
            hint="choose another name, or --force to replace what it holds",
        )


def _refuse_own(store: Store, destination: bytes) -> None:
    """Never write over the store or a working tree: their content is not ours to replace."""
    real = os.path.realpath(destination)
    own = [os.fsencode(store.home), *(path for _, path in store.catalog.attached_paths())]
    for path in own:
        ours = os.path.realpath(path)
        if os.path.commonpath((real, ours)) in (real, ours):
            raise WouldLose(
                f"{shown(destination)} is in, or holds, {shown(ours)}, which dm works in",
                hint="export to somewhere else; dm restore and dm reset change working trees",
            )


# --- directories ---------------------------------------------------------------------------------


def _export_directory(
    store: Store,
    dot: DotId,
    request: ExportRequest,
    commit: ObjectId,
    root: Entry,
    path: bytes,
    progress: Progress | None,
) -> ExportSummary:
    is_new = not os.path.isdir(request.destination)
    with _directory(request.destination) as building:
        result = restore_tree(
            tree_path=building,
            as_subdot=path or None,
            store=store.objects(dot),
            target=root,
            current=None,
            stat_cache=None,
            now_ns=store.clock()[0],
            trusted=request.trusted,
            root_metadata=replace(root, tree=None) != ROOT_ENTRY,
            unseen=is_new,
            progress=progress,
        )
    return ExportSummary(
        commit,
        path,
        result.files_written,
        result.bytes_written,
        tuple(result.withheld),
        tuple(result.unapplied),
    )


@contextmanager
def _directory(destination: bytes) -> Iterator[bytes]:
    """Where to write: the directory that is there, or one that gets its name when it is whole."""
    if os.path.isdir(destination):
        yield destination
        return
    final = os.path.abspath(destination)
    building = os.path.join(os.path.dirname(final), temporary_name())
    try:
        with storage_errors(f"making {shown(final)}"):
            os.mkdir(building, 0o755)
        yield building
        with storage_errors(f"making {shown(final)}"):
            os.rename(building, final)
    except BaseException:
        with suppress(StorageFailed):
            remove_tree(building)
        raise
    fsync_directory(os.path.dirname(final))


# --- archives ------------------------------------------------------------------------------------


def _write_archive(
    store: Store,
    dot: DotId,
    write: Callable[[bytes], object],
    commit: Commit,
    path: bytes,
    entry: Entry,
    progress: Progress | None,
) -> TarStream:
    users, groups = dict(commit.user_names), dict(commit.group_names)
    objects = store.objects(dot)
    tar = TarStream(objects, write, users, groups, progress)
    if entry.kind is EntryKind.DIRECTORY:
        if progress is not None:
            progress.phase("writing", sizes=(below.size for _, below in walk_tree(objects, entry)))
        if replace(entry, tree=None) != ROOT_ENTRY:
            tar.add(b".", entry)
        tar.add_tree(entry)
    else:
        tar.add(path.rpartition(b"/")[2], entry)
    tar.finish()
    return tar


@contextmanager
def _archive(request: ExportRequest) -> Iterator[Callable[[bytes], object]]:
    """Takes the archive's bytes; a file gets its name when it is whole and durable."""
    if request.destination == STDOUT:
        assert request.stream is not None, "the caller says where standard output is"
        yield request.stream.write
        request.stream.flush()
        return
    with whole_file(request.destination, mode=_FILE_MODE) as file:
        with _compressed(file, request.destination) as write:
            yield write


@contextmanager
def _compressed(file: IO[bytes], name: bytes) -> Iterator[Callable[[bytes], object]]:
    if name.endswith(b".zst"):
        with zstandard.ZstdCompressor(level=_ZSTD_LEVEL, write_checksum=True).stream_writer(
            file, closefd=False
        ) as stream:
            yield stream.write
    elif name.endswith(b".gz"):
        # Neither a name nor a time inside: the same tree gives the same bytes.
        with gzip.GzipFile("", "wb", _GZIP_LEVEL, file, mtime=0) as packed:
            yield packed.write
    else:
        yield file.write
