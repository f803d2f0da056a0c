"""The moment from which on the stats of a tree are compared, and the mmap rule.

A store to a page that is already dirty does not move its file's times (notes/peers.md 5.3); the
first store to a page that is clean does, on the filesystems that `moves_times_promptly` names. So:

- A file is **read and recorded** only after its filesystem was synced, which cleans and
  write-protects every page. Its stat is taken after that sync and around the reading. From then on
  a store moves its times; and it moves them to a time at or after the scan's `threshold_ns`, which
  was taken before the walk and so before the sync. A recorded stat whose times reach the threshold
  is never trusted: what stored between sync and stat, or twice within one tick of the clock, is
  caught by that.
- A file whose stat **equals a trusted recorded one** is unchanged, with no sync now: its pages
  were clean when that stat was recorded, so a store since then would have moved the times away
  from it. A sync now would detect nothing more, for syncing moves no times there. It stays trusted
  in the next cache for the same reason.
- So the walk comes first. Where it finds nothing, nothing is synced; at the first change a thread
  starts to sync, and `settle` waits for it before the first content is read. The stats that the
  walk took of changed files are compared, never recorded: `fstat` of the file being read is.
- A status reads, and records nothing: reading sees every store already, and needs no sync.
- Where times may move only when pages are written back (ZFS, network filesystems, overlays on
  anything), a stat means nothing before a sync: such a filesystem is synced when the walk enters
  it. On memory filesystems there is no writeback at all, and a stat never vouches for a file.

Mounts inside the tree are walked like any directory: bind mounts are how containers put volumes
together, and what the application sees is what a dot is to hold. The rule is kept on each
filesystem that the walk enters.
"""

import os
import stat
import threading
from dataclasses import dataclass, field
from enum import Enum
from typing import Final

from dmsync.engine.safe_files import (
    filesystem_now_ns,
    keeps_no_pages,
    moves_times_promptly,
    sync_filesystem,
)
from dmsync.errors import DmError
from dmsync.storage.stages import stage
from dmsync.storage.stat_cache import Stat

RACY_NS: Final = 20_000_000
"""Timestamps move in ticks of up to 10 ms: what changed within two ticks of the baseline may
change again without its times showing it."""
_MTIME: Final = 3
_CTIME: Final = 4


class Sync(Enum):
    """When filesystems are synced whose times move promptly."""

    ON_ENTERING = "on entering"
    BEFORE_READING = "before reading"
    NEVER = "never"


@dataclass
class Baseline:
    """Times and filesystems of one walk. Close it where `sync` is BEFORE_READING."""

    now_ns: int
    sync: Sync = Sync.ON_ENTERING
    threshold_ns: int = 0
    devices: set[int] = field(default_factory=set)
    untrusted_devices: set[int] = field(default_factory=set)
    _unsynced: list[int] = field(default_factory=list)
    """Descriptors of our own of filesystems entered and yet to be synced."""
    _thread: threading.Thread | None = None
    _failure: DmError | None = None

    def enter_device(self, fd: int, device: int) -> None:
        """Take the time of a filesystem that the walk enters, and see that it is synced, once each.

        Raises:
            StorageFailed: the kernel could not write it.
        """
        if device in self.devices:
            return
        entered_ns = min(self.now_ns, filesystem_now_ns(fd, self.now_ns))
        first = not self.devices
        self.devices.add(device)
        if self.sync is Sync.ON_ENTERING or not moves_times_promptly(fd):
            with stage("sync"):
                sync_filesystem(fd)
        elif self.sync is Sync.BEFORE_READING:
            self._unsynced.append(os.dup(fd))
        if keeps_no_pages(device):
            self.untrusted_devices.add(device)
        self.threshold_ns = (
            entered_ns - RACY_NS if first else min(self.threshold_ns, entered_ns - RACY_NS)
        )

    def change_met(self) -> None:
        """Something will have to be read: sync meanwhile what was entered so far."""
        if self._unsynced and self._thread is None:
            self._thread = threading.Thread(target=self._sync_entered, name="sync", daemon=True)
            self._thread.start()

    def _sync_entered(self) -> None:
        try:
            while self._unsynced:
                fd = self._unsynced.pop()
                try:
                    with stage("sync"):
                        sync_filesystem(fd)
                finally:
                    os.close(fd)
        except DmError as failure:
            self._failure = failure

    def settle(self) -> None:
        """Wait until every filesystem entered is synced; before anything is read and recorded.

        Raises:
            StorageFailed: the kernel could not write one.
        """
        if self._thread is not None:
            self._thread.join()
        self._sync_entered()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Wait for a sync under way, and leave nothing open."""
        if self._thread is not None:
            self._thread.join()
        while self._unsynced:
            os.close(self._unsynced.pop())

    def trusts(self, entry: Stat, device: int) -> bool:
        """Whether an equal stat will mean equal content from now on."""
        if entry[_MTIME] >= self.threshold_ns or entry[_CTIME] >= self.threshold_ns:
            return False
        return device not in self.untrusted_devices or not stat.S_ISREG(entry[0])
