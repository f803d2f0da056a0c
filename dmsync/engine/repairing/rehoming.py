"""A whole pack that lies in another dot's directory goes home."""

import os

from dmsync.engine.repairing.packs import HarmedFile
from dmsync.engine.store import Store
from dmsync.storage.durable import fsync_directory, storage_errors
from dmsync.storage.object_store import ObjectStore


def bring_home(store: Store, objects: ObjectStore, file: HarmedFile) -> bool:
    """Move the pack to the dot that it names; False when that dot is not here, or has a file of
    that name already."""
    assert file.belongs_to is not None
    owner = store.catalog.dot(file.belongs_to)
    if owner is None or owner.trash is not None:
        return False
    home = store.objects(owner.dot)
    source = os.path.join(objects.sealed.directory, file.name)
    target = os.path.join(home.sealed.directory, file.name)
    if os.path.lexists(target):
        return False
    with storage_errors(f"moving pack {file.name}"):
        os.rename(source, target)
    fsync_directory(home.sealed.directory)
    fsync_directory(objects.sealed.directory)
    for changed in (home, objects):
        changed.sealed.forget_files()
        changed.sealed.index.catch_up()
    return True
