"""Harmed packs: set aside, and the records in them that are sound put into a new pack."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from dmsync.core.ids import DotId
from dmsync.errors import Corruption, FormatUnsupported
from dmsync.storage.durable import fsync_directory, make_directory_durable, storage_errors
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.pack_consolidation import TEMPORARY_PREFIX
from dmsync.storage.pack_rescue import HarmedPack, Rescue
from dmsync.storage.packs import (
    HEADER_BYTES,
    PACK_SUFFIX,
    PackBuilder,
    check_header,
    pack_hash_matches,
    read_footer,
    read_table,
)

DAMAGED_DIRECTORY: Final = "damaged"


@dataclass(frozen=True)
class HarmedFile:
    """A pack that is not what it was when it was sealed, and why. `belongs_to`: it is whole, and
    another dot's."""

    name: str
    why: str
    belongs_to: DotId | None = None


@dataclass(frozen=True)
class Rescued:
    """What became of one harmed pack: records in a new one, and places without a sound one."""

    name: str
    records: int
    lost: int


def harmed_files(objects: ObjectStore) -> Iterator[HarmedFile]:
    """Packs whose bytes are not those that were sealed, by reading all of them.

    Raises:
        FormatUnsupported: one is of a newer dmsync, so that nothing can be said of it.
    """
    directory = objects.sealed.directory
    with storage_errors(f"listing {directory}"):
        names = sorted(name for name in os.listdir(directory) if name.endswith(PACK_SUFFIX))
    for name in names:
        found = _judge(os.path.join(directory, name), name, objects.dot_id)
        if found is not None:
            yield found


def _judge(path: str, name: str, dot_id: bytes) -> HarmedFile | None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None  # joined with others a moment ago
    except OSError as exc:
        return HarmedFile(name, exc.strerror or str(exc))
    try:
        read_footer(fd, name)
        if not pack_hash_matches(fd, name):
            return HarmedFile(name, "its hash is not the one it states")
        owner = check_header(os.pread(fd, HEADER_BYTES, 0), name)
        if owner != dot_id:
            return HarmedFile(name, "it belongs to another dot", DotId(owner))
    except Corruption as exc:
        return HarmedFile(name, exc.message)
    except FormatUnsupported as exc:
        if not _was_of_ours(fd, name):
            raise
        return HarmedFile(name, f"its header is damaged: {exc.message}")
    except OSError as exc:
        return HarmedFile(name, exc.strerror or str(exc))
    finally:
        os.close(fd)
    return None


def _was_of_ours(fd: int, name: str) -> bool:
    """Whether a pack that seems newer is one of this version with a harmed header: it ends like
    one, and its hash is not that of what it is now."""
    try:
        read_table(fd, name)
    except Corruption:
        return False
    return not pack_hash_matches(fd, name)


def set_aside(path: str, directory: str) -> str:
    """Move a file into the directory `damaged` of `directory`, durably; returns its new path."""
    kept = os.path.join(directory, DAMAGED_DIRECTORY)
    make_directory_durable(kept)
    name = os.path.basename(path)
    target, number = os.path.join(kept, name), 1
    while os.path.lexists(target):
        number += 1
        target = os.path.join(kept, f"{name}.{number}")
    with storage_errors(f"setting {path} aside"):
        os.rename(path, target)
    fsync_directory(kept)
    fsync_directory(os.path.dirname(path))
    return target


def set_aside_and_rescue(objects: ObjectStore, harmed: Sequence[HarmedFile]) -> list[Rescued]:
    """Move harmed packs out of the way; what is sound in them is stored again, durably.

    A stop in between loses nothing: the next repair reads what was set aside.
    """
    index = objects.sealed.index
    tables = {file.name: index.places_in(file.name) for file in harmed}
    packs: list[HarmedPack] = []
    try:
        for file in harmed:
            path = os.path.join(objects.sealed.directory, file.name)
            moved = set_aside(path, objects.dot_dir)
            packs.append(HarmedPack(moved, tables[file.name]))
        objects.sealed.forget_files()
        index.catch_up()
        return _store_again(objects, packs)
    finally:
        for pack in packs:
            pack.close()


def _store_again(objects: ObjectStore, packs: Sequence[HarmedPack]) -> list[Rescued]:
    counts = {pack.name: 0 for pack in packs}
    builder = PackBuilder.create(objects.sealed.directory, TEMPORARY_PREFIX, "", objects.dot_id)
    try:
        for pack, _, key, record in Rescue(packs, [objects.sealed]).sound_records():
            builder.append(record, key)
            counts[pack.name] += 1
        if builder.records:
            objects.publish([builder])
        else:
            builder.discard()
    except BaseException:
        builder.discard()
        raise
    return [Rescued(pack.name, counts[pack.name], len(pack.unread_offsets)) for pack in packs]


def damaged_packs(dot_dir: str) -> list[str]:
    """Paths of packs that were set aside before."""
    kept = os.path.join(dot_dir, DAMAGED_DIRECTORY)
    try:
        names = sorted(os.listdir(kept))
    except FileNotFoundError:
        return []
    return [os.path.join(kept, name) for name in names if PACK_SUFFIX in name]
