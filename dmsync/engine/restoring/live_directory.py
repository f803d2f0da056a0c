"""One directory of a live tree while it is made equal to its target."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from dmsync.core.objects import Entry
from dmsync.engine.safe_files import Xattrs
from dmsync.engine.tree_scan import stat_of
from dmsync.storage.stat_cache import Remarks, Stat, encode_live, encode_remarks


@dataclass(slots=True)
class DirectoryWork:
    """A directory to be restored. `is_same`: the cache's tree has the same pages there. `entry` is
    its target where that is at hand; the last two are known of one that this restore made."""

    name: bytes
    is_same: bool
    is_new: bool
    needs_metadata: bool
    entry: Entry | None = None
    device: int = 0
    has_default_acl: bool = False


@dataclass(slots=True)
class LiveDirectory:
    """`fd` is valid while names of the directory wait to be made."""

    path: bytes
    number: int
    fd: int
    device: int
    is_own: bool
    """Made by this restore, or unseen by others until it is done: a name may be made in place."""
    has_default_acl: bool
    """What is made in it gets attributes of its own."""
    before: dict[bytes, Stat]
    """Stats of the names listed."""
    vouched: dict[bytes, Stat] = field(default_factory=dict)
    """Stats under which the cache knows the content of names."""
    recorded: dict[bytes, Entry] = field(default_factory=dict)
    """What the cache knows names to hold."""
    remarks: Remarks = field(default_factory=Remarks)
    after: dict[bytes, Stat] = field(default_factory=dict)
    untrusted: set[bytes] = field(default_factory=set)
    links: list[tuple[bytes, bytes]] = field(default_factory=list)
    applied_xattrs: dict[bytes, Xattrs] = field(default_factory=dict)
    withheld: list[bytes] = field(default_factory=list)
    is_unlocked: bool = False
    target: Entry | None = None
    """Set when its own metadata is to be applied."""
    is_leaf: bool = False
    """Nothing below it is still to be restored."""

    def keep_applied_xattrs(self, name: bytes) -> None:
        """A name that stays keeps the cache's remark on its attributes."""
        for known_name, xattrs in self.remarks.applied_xattrs:
            if known_name == name:
                self.applied_xattrs[name] = xattrs

    def encoded(self) -> tuple[bytes, bytes]:
        """(live, remarks) for its block of the new stat cache."""
        names = sorted(self.after)
        remarks = Remarks(
            frozenset(self.untrusted),
            tuple(self.links),
            tuple(sorted(self.applied_xattrs.items())),
            tuple(self.withheld),
        )
        live = encode_live(names, [self.after[name] for name in names])
        return live, encode_remarks(remarks)


def list_names(fd: int) -> tuple[list[bytes], list[Stat]]:
    """Names and stats of everything in `fd`, also what a cut restore left."""
    found = []
    stat_at: Callable[..., os.stat_result] = os.stat
    for text in os.listdir(fd):
        try:
            status = stat_at(text, dir_fd=fd, follow_symlinks=False)
        except FileNotFoundError:
            continue
        found.append((os.fsencode(text), stat_of(status)))
    found.sort()
    return [name for name, _ in found], [status for _, status in found]


def has_default_acl(fd: int) -> bool:
    """Whether what is made in this directory inherits attributes from it."""
    try:
        return "system.posix_acl_default" in os.listxattr(fd)
    except OSError:  # no attributes on this filesystem
        return False
