"""Joining small packs into larger ones, so that their number grows with the logarithm of history.

Each commit and each push seals a pack of its own. Whoever seals one joins those of a size class
once there are PACKS_PER_CLASS: the records go verbatim, one behind the other, into a new pack.
Each record is copied at most once for every class, and large packs never are.

Order, for a stop at any point (protocol/PACKS.md 4): the new pack is durable under its name; then
one transaction of the index takes it in and the old ones out; then the old files go. A stop in
between leaves records twice, never not at all. A reader that looked a record up before finds the
old file gone and asks the index where the record is now.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from dmsync.errors import Corruption, FormatUnsupported, StorageFailed, StorageFull
from dmsync.storage.durable import fsync_directory, storage_errors
from dmsync.storage.packs import (
    HEADER_BYTES,
    Footer,
    PackBuilder,
    PackInfo,
    pack_hash_matches,
    read_footer,
)

if TYPE_CHECKING:
    from dmsync.storage.pack_index import PackIndex

PACKS_PER_CLASS: Final = 16
CLASS_BYTES: Final = (4 * 1024, 64 * 1024, 1024 * 1024, 4 * 1024 * 1024)
"""Upper bounds of the size classes. A pack beyond the last one stays as it is: copying it again
would cost more than a name in a directory and a row of the index."""
JOINED_BYTES_MAX: Final = 64 * 1024 * 1024
JOINED_PACKS_MAX: Final = 512
"""What one join copies at most. So few packs that the index, which remembers twice as many
replaced ones, still names those whose removal was cut short."""
TEMPORARY_PREFIX: Final = "tmp-"


@dataclass(frozen=True, slots=True)
class JoinedPack:
    """A sealed pack that holds all records of others.

    `parts` are those: name, table, and by how many bytes their records have moved.
    """

    info: PackInfo
    footer: Footer
    parts: Sequence[tuple[str, Footer, int]]


def packs_to_join(packs: Sequence[PackInfo]) -> list[PackInfo]:
    """The packs of one size class that is full, oldest first; of the smallest such class."""
    classes: list[list[PackInfo]] = [[] for _ in CLASS_BYTES]
    for pack in packs:
        for number, limit in enumerate(CLASS_BYTES):
            if pack.bytes < limit:
                classes[number].append(pack)
                break
    for found in classes:
        if len(found) >= PACKS_PER_CLASS:
            return _as_many_as_allowed(found)
    return []


def _as_many_as_allowed(packs: list[PackInfo]) -> list[PackInfo]:
    total = 0
    for count, pack in enumerate(packs[:JOINED_PACKS_MAX]):
        total += pack.bytes
        if total > JOINED_BYTES_MAX:
            return packs[:count]
    return packs[:JOINED_PACKS_MAX]


def consolidate(index: "PackIndex", directory: str, dot_id: bytes) -> None:
    """Join small packs of `directory` as long as a size class is full. Not having done so harms
    nobody, so neither a full disk nor a damaged pack is an error here: fsck tells of that."""
    unsound: set[str] = set()

    def join(packs: list[PackInfo]) -> JoinedPack | None:
        chosen = packs_to_join([pack for pack in packs if pack.name not in unsound])
        return _join(directory, dot_id, chosen, unsound) if chosen else None

    try:
        while packs_to_join([pack for pack in index.packs() if pack.name not in unsound]):
            before = len(unsound)
            if not index.replace(join) and len(unsound) == before:
                return
            index.remove_replaced_files()
    except (StorageFull, StorageFailed):
        return


def _join(
    directory: str, dot_id: bytes, packs: Sequence[PackInfo], unsound: set[str]
) -> JoinedPack | None:
    """Copy the records of `packs` into a new, durable pack; None when too few are sound. What is
    not is added to `unsound` and stays as it is: a copy would bless the damage with a new hash."""
    builder = PackBuilder.create(directory, TEMPORARY_PREFIX, "", dot_id)
    try:
        parts: list[tuple[str, Footer, int]] = []
        for pack in packs:
            found = _read_whole(os.path.join(directory, pack.name), pack.name)
            if found is None:
                unsound.add(pack.name)
                continue
            footer, records = found
            parts.append((pack.name, footer, builder.size - HEADER_BYTES))
            _append(builder, footer, records)
        if len(parts) < 2:
            builder.discard()
            return None
        info = builder.finish()
        with storage_errors(f"sealing pack {info.name}"):
            os.rename(builder.path, os.path.join(directory, info.name))
    except BaseException:
        builder.discard()
        raise
    fsync_directory(directory)
    joined = JoinedPack(info, builder.footer(), parts)
    builder.close()
    return joined


def _read_whole(path: str, name: str) -> tuple[Footer, bytes] | None:
    """A pack's table and records, verified against its hash; None when it is not sound."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        footer, _ = read_footer(fd, name)
        if not pack_hash_matches(fd, name):
            return None
        length = footer.records_end - HEADER_BYTES
        records = os.pread(fd, length, HEADER_BYTES)
        return (footer, records) if len(records) == length else None
    except (Corruption, FormatUnsupported, OSError):
        return None
    finally:
        os.close(fd)


def _append(builder: PackBuilder, footer: Footer, records: bytes) -> None:
    ends = [*footer.offsets[1:], footer.records_end]
    for key, start, end in zip(footer.keys, footer.offsets, ends, strict=True):
        builder.append(records[start - HEADER_BYTES : end - HEADER_BYTES], key)
