"""What pushes and pulls do to working trees and deleted dots of a store: ports.TargetTree, filled.

Given to the sync functions by their callers, so that these know neither trees nor dots.
"""

from dmsync.core.events import CommitsAdded, Event, MergeEnded, TreeSwitchStarted
from dmsync.core.ids import DotId, ObjectId
from dmsync.engine import switching, trees
from dmsync.engine.dots import revive_dot
from dmsync.engine.ports import TargetTree
from dmsync.engine.store import Store


def _save_dirty(store: Store, dot: DotId, branch: str) -> ObjectId | None:
    """A snapshot of uncommitted state that refs may name (it becomes a stash), or None."""
    place = trees.place_of(store, dot, branch)
    if place is None:
        return None
    snapshot = switching.save_working(store, dot, place, "divergence", None)
    if snapshot is not None:
        with store.transaction("stash") as tx:
            tx.append(CommitsAdded(dot, (snapshot,)))
    return snapshot


def _switch_events(
    store: Store, dot: DotId, branch: str, held: ObjectId | None, tip: ObjectId
) -> list[Event]:
    """What to record with the move of a materialised branch, so that a kill cannot come between
    the ref and the knowledge that its tree is behind."""
    if trees.place_of(store, dot, branch) is None:
        return []
    events: list[Event] = []
    if store.catalog.merge(dot, branch) is not None:  # its state was kept with the stashed line
        events.append(MergeEnded(dot, branch, "aborted"))
    return [*events, TreeSwitchStarted(dot, branch, held, tip, "sync")]


def _finish_switches(store: Store, dot: DotId) -> None:
    switching.finish_switch(store, dot)


TARGET_TREE = TargetTree(
    refuse_if_dirty=trees.refuse_if_dirty,
    save_dirty=_save_dirty,
    switch_events=_switch_events,
    finish_switches=_finish_switches,
    locked=switching.ready,
    revive=revive_dot,
)
