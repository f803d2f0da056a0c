"""Remotes: the names under which other clusters are known here."""

from dmsync.core.events import RemoteAdded, RemoteRemoved, RemoteRenamed
from dmsync.core.names import check_remote_name, parse_remote_url
from dmsync.engine.store import Store
from dmsync.errors import AlreadyExists, RemoteNotFound
from dmsync.storage.catalog import RemoteRow


def add_remote(store: Store, name: str, url_text: str, dm_command: str | None = None) -> RemoteRow:
    """Record a remote; nobody is contacted.

    Raises:
        InvalidName, UsageError: the name or URL is none.
        AlreadyExists: the name is taken.
    """
    check_remote_name(name)
    parse_remote_url(url_text)
    with store.transaction("remote-add") as tx:
        if store.catalog.remote(name) is not None:
            raise AlreadyExists(f"Remote exists '{name}'", hint=f"dm remote rm {name} removes it")
        tx.append(RemoteAdded(name, url_text, dm_command))
    return find_remote(store, name)


def remove_remote(store: Store, name: str) -> None:
    """Forget a remote, its upstreams and what was last seen there. Raises RemoteNotFound."""
    find_remote(store, name)
    with store.transaction("remote-rm") as tx:
        tx.append(RemoteRemoved(name))


def rename_remote(store: Store, old: str, new: str) -> None:
    """Rename a remote with its upstreams. Raises RemoteNotFound, AlreadyExists, InvalidName."""
    check_remote_name(new)
    find_remote(store, old)
    with store.transaction("remote-rename") as tx:
        if store.catalog.remote(new) is not None:
            raise AlreadyExists(f"Remote exists '{new}'")
        tx.append(RemoteRenamed(old, new))


def find_remote(store: Store, name: str) -> RemoteRow:
    """The remote of that name. Raises RemoteNotFound."""
    row = store.catalog.remote(name)
    if row is None:
        raise RemoteNotFound(
            f"No such remote '{name}'", hint="dm remote -v lists them, dm remote add makes one"
        )
    return row


def list_remotes(store: Store) -> list[RemoteRow]:
    """All remotes by name."""
    return sorted(store.catalog.remotes(), key=lambda remote: remote.name)
