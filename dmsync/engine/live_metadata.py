"""What is recorded of a live name besides its content.

What is recorded and what is applied in the live tree may differ (an ordinary user cannot chown;
devices, setuid and capabilities wait for trust): wherever the applied value is untouched since, the
recorded one is taken back.
"""

import stat
from dataclasses import dataclass
from typing import Final, NamedTuple

from dmsync.core.objects import XATTRS_MAX, Entry, EntryKind
from dmsync.engine.safe_files import Xattrs
from dmsync.engine.tree_scan import GID, MODE, MTIME, UID
from dmsync.storage.stat_cache import Stat

_INT64: Final = 2**63
_PERMISSIONS: Final = 0o7777

KINDS: Final = {
    stat.S_IFREG: EntryKind.FILE,
    stat.S_IFDIR: EntryKind.DIRECTORY,
    stat.S_IFLNK: EntryKind.SYMLINK,
    stat.S_IFIFO: EntryKind.FIFO,
    stat.S_IFCHR: EntryKind.CHARACTER_DEVICE,
    stat.S_IFBLK: EntryKind.BLOCK_DEVICE,
}


@dataclass(slots=True)
class LiveName:
    """One name of a directory being built: what was scanned and what is recorded."""

    name: bytes
    path: bytes
    live: Stat
    before: Stat | None
    recorded: Entry | None
    device: int
    applied_xattrs: Xattrs | None
    is_trusted: bool = True

    def takes_back(self) -> bool:
        """Whether recorded values still stand behind the applied ones."""
        return (
            self.recorded is not None
            and self.before is not None
            and stat.S_IFMT(self.before[MODE]) == stat.S_IFMT(self.live[MODE])
            and KINDS.get(stat.S_IFMT(self.live[MODE])) is self.recorded.kind
        )


class Metadata(NamedTuple):
    """What Entry says of a name besides its kind and content."""

    mode: int
    uid: int
    gid: int
    mtime_ns: int
    hardlink: bytes
    xattrs: Xattrs
    extensions: tuple[tuple[int, bytes], ...] = ()


def metadata_of(item: LiveName, xattrs: Xattrs, hardlink: bytes) -> Metadata:
    """The live metadata, recorded values where the applied ones are untouched."""
    live, before, recorded = item.live, item.before, item.recorded
    mtime_ns = live[MTIME]
    if not -_INT64 <= mtime_ns < _INT64:
        mtime_ns = -_INT64 if mtime_ns < 0 else _INT64 - 1
    metadata = Metadata(live[MODE] & _PERMISSIONS, live[UID], live[GID], mtime_ns, hardlink, xattrs)
    if recorded is None or not item.takes_back():
        return metadata
    assert before is not None
    applied = recorded.xattrs if item.applied_xattrs is None else item.applied_xattrs
    return Metadata(
        _mode_taken_back(live[MODE], before[MODE], recorded.mode),
        recorded.uid if live[UID] == before[UID] else metadata.uid,
        recorded.gid if live[GID] == before[GID] else metadata.gid,
        recorded.mtime_ns if live[MTIME] == before[MTIME] else metadata.mtime_ns,
        hardlink,
        _taken_back(xattrs, applied, recorded.xattrs),
        recorded.extensions,
    )


def _mode_taken_back(live: int, applied: int, recorded: int) -> int:
    """The recorded mode while the applied one is untouched, else the live one with the set-id bits
    that are recorded and were not applied: who could not see them did not take them away."""
    if live == applied:
        return recorded
    return stat.S_IMODE(live) | (recorded & ~applied & (stat.S_ISUID | stat.S_ISGID))


def _taken_back(live: Xattrs, applied: Xattrs, recorded: Xattrs) -> Xattrs:
    """`live`, but what was recorded for each attribute that is as it was applied."""
    if live == applied:
        return recorded
    now, then, kept = dict(live), dict(applied), dict(recorded)
    result = {}
    for name in now.keys() | kept.keys():
        value = kept.get(name) if now.get(name) == then.get(name) else now.get(name)
        if value is not None:
            result[name] = value
    return tuple(sorted(result.items()))[:XATTRS_MAX]
