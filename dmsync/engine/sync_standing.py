"""Is the remote what it was when it was last seen? Told by its cluster and log (WIRE.md 5.8).

A store that was put back from an old copy answers with a shorter log of the same epoch. Going on
as if nothing had happened would make its old state everybody's: so nothing moves on either side
until somebody has said that it may. What was seen there stays in the tracking refs until then,
and in their reflog afterwards.
"""

from collections.abc import Mapping
from enum import StrEnum

from dmsync.core.ids import DotId
from dmsync.engine.ports import SyncStore
from dmsync.engine.sync_opening import RemoteDot
from dmsync.errors import RemoteRewound
from dmsync.storage.catalog import ObservedRow

LastSeen = Mapping[DotId, ObservedRow]


class Standing(StrEnum):
    """What became of a remote since it was last seen."""

    SAME = ""
    REWOUND = "rewound"
    """Its log ends before what was seen of it."""
    NEW_EPOCH = "new-epoch"
    """It lost the end of its log, knows it, and numbers anew: nothing to compare with."""
    OTHER_STORE = "other-store"
    """Another store answers under that name."""


def last_seen(store: SyncStore, name: str, dot: DotId | None) -> LastSeen:
    """What is known of a remote's dots, or of one. To be asked before the remote is: what another
    command of ours learns there meanwhile may be newer than the answer."""
    dots = [row.dot for row in store.catalog.dots()] if dot is None else [dot]
    found = ((each, store.catalog.observed(name, each)) for each in dots)
    return {each: seen for each, seen in found if seen is not None}


def standing_of(seen: ObservedRow | None, remote: RemoteDot) -> Standing:
    """Compare what the remote says with what was recorded when it was last met."""
    if seen is None:
        return Standing.SAME
    if seen.cluster_id != remote.cluster_id:
        return Standing.OTHER_STORE
    if seen.epoch != remote.epoch:
        return Standing.NEW_EPOCH
    return Standing.REWOUND if remote.seq < seen.seq else Standing.SAME


def refuse_rewound(
    store: SyncStore,
    name: str,
    dot: DotId,
    remote: RemoteDot,
    known: LastSeen,
    *,
    accept_rewind: bool,
) -> Standing:
    """The remote's standing; `known` is what `last_seen` gave before the remote was asked.

    Raises:
        RemoteRewound, unless that is accepted.
    """
    seen = known.get(dot)
    standing = standing_of(seen, remote)
    if standing is not Standing.REWOUND or accept_rewind or seen is None:
        return standing
    forgotten = _forgotten(store, name, dot, remote)
    lost = f"; it no longer has {', '.join(forgotten)}" if forgotten else ""
    raise RemoteRewound(
        f"{name} was put back to an older state: its log ends at {remote.seq} and had reached "
        f"{seen.seq}{lost}. Nothing was changed",
        hint=f"what it had is kept here as remote/{name}/BRANCH. If this is known to be right: "
        f"dm push {name} --accept-rewind brings back there what your branches have, "
        f"dm fetch {name} --accept-rewind goes on with what it has now",
        remote=name,
        seq=remote.seq,
        seq_seen=seen.seq,
        forgotten=forgotten,
    )


def _forgotten(store: SyncStore, name: str, dot: DotId, remote: RemoteDot) -> list[str]:
    """Tracking refs whose commit no ref of the remote names any more, `branch at id`."""
    prefix = f"remote/{name}/"
    tips = set(remote.tips())
    return [
        f"{row.name.removeprefix(prefix)} at {row.target.hex()[:12]}"
        for row in store.catalog.refs(dot, prefix)
        if row.target not in tips
    ]
