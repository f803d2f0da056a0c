"""Collaborators: who may read and write a dot of this store beside its owner."""

from typing import Final

from dmsync.core.events import CollaboratorAdded, CollaboratorRemoved
from dmsync.core.names import check_namespace, full_name
from dmsync.engine.ports import SyncStore
from dmsync.errors import NotFound, UsageError
from dmsync.storage.catalog import DotRow
from dmsync.wire.limits import COLLABORATORS_MAX

COMMAND_ADD: Final = "collaborator-add"
COMMAND_REMOVE: Final = "collaborator-rm"


def add_collaborator(store: SyncStore, row: DotRow, user: str, actor: str) -> bool:
    """Share a dot with a user; False when it is already. Durable.

    Raises:
        InvalidName. UsageError: the dot is in the user's own namespace, or has too many.
    """
    check_namespace(user)
    if user == row.namespace:
        raise UsageError(f"{full_name(row.namespace, row.name)} belongs to {user} already")
    with store.catalog.transaction(COMMAND_ADD, actor) as tx:
        known = store.catalog.collaborators(row.dot)
        if user in known:
            return False
        if len(known) >= COLLABORATORS_MAX:
            raise UsageError(f"a dot has at most {COLLABORATORS_MAX} collaborators")
        tx.append(CollaboratorAdded(row.dot, user))
    return True


def remove_collaborator(store: SyncStore, row: DotRow, user: str, actor: str) -> None:
    """Share it with the user no longer. Durable. Raises NotFound."""
    with store.catalog.transaction(COMMAND_REMOVE, actor) as tx:
        if user not in store.catalog.collaborators(row.dot):
            raise NotFound(
                f"{user} is no collaborator of {full_name(row.namespace, row.name)}",
                hint="dm collaborator list",
                user=user,
            )
        tx.append(CollaboratorRemoved(row.dot, user))
