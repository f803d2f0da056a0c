"""What a restore reports: counts, and what of the record it could not or must not apply."""

from dataclasses import dataclass, field

from dmsync.storage.stat_cache import StatCache


@dataclass
class RestoreResult:
    """`stat_cache` vouches for the tree as restored; save it once the switch is recorded."""

    stat_cache: StatCache
    files_written: int = 0
    bytes_written: int = 0
    names_removed: int = 0
    withheld: list[bytes] = field(default_factory=list)
    """Recorded names not made here: devices, for want of trust or rights."""
    unapplied: list[bytes] = field(default_factory=list)
    """Paths some of whose recorded metadata could not or must not be applied."""
