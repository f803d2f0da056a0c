"""The store as it was: its log folded up to some event, for questions only (`--at-op`)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import ClassVar, NoReturn

from dmsync.core.ids import DotId
from dmsync.engine.settings import EngineSettings
from dmsync.engine.store import Store
from dmsync.errors import NotFound, UsageError
from dmsync.storage.catalog import PastCatalog
from dmsync.storage.durable import storage_errors
from dmsync.storage.layout import open_store


class PastStore(Store):
    """A store whose catalog shows it as the operation with event `seq` left it. O(log) to open;
    takes no change.

    Content that has been pruned or purged since is not there any more.
    """

    is_past: ClassVar[bool] = True

    def __init__(self, home: str, settings: EngineSettings, seq: int) -> None:
        """Raises NotFound: there is no event `seq` yet; as Store.open otherwise."""
        super().__init__(open_store(home, sudo_user=settings.sudo_user), settings)
        try:
            check_seq(self, seq)
            with storage_errors("making a temporary directory"):
                self._directory = TemporaryDirectory(prefix="dmsync-")
            past = _folded(self, self._directory.name, seq)
        except BaseException:
            super().close()
            raise
        self.catalog.close()
        self.catalog = past

    def _objects_dir(self, dot: DotId) -> str:
        """A dot deleted since lies in the trash."""
        if not os.path.isdir(self.layout.packs_dir(dot)):
            prefix = f"{dot.hex()}-"
            for name in sorted(os.listdir(self.layout.trash_dir)):
                if name.startswith(prefix):
                    return self.layout.trashed_dot_dir(name)
        return super()._objects_dir(dot)

    def dot_locked(self, dot: DotId) -> NoReturn:
        raise UsageError("the past cannot be changed", hint="leave out --at-op")

    def close(self) -> None:
        super().close()
        self._directory.cleanup()


def check_seq(store: Store, seq: int) -> None:
    """Raises NotFound: the store has no event of that number."""
    last = store.catalog.last_seq()
    if not 1 <= seq <= last:
        raise NotFound(
            f"there is no operation {seq}: the newest event is {last}",
            hint="dm op log lists them",
            seq=seq,
        )


@contextmanager
def catalog_at(store: Store, seq: int) -> Iterator[PastCatalog]:
    """The catalog of an open store as the operation with event `seq` left it. O(log).

    Raises NotFound.
    """
    check_seq(store, seq)
    with storage_errors("making a temporary directory"):
        directory = TemporaryDirectory(prefix="dmsync-")
    with directory as path, _folded(store, path, seq) as catalog:
        yield catalog


def _folded(store: Store, directory: str, seq: int) -> PastCatalog:
    path = os.path.join(directory, "catalog.sqlite")
    return PastCatalog.folded_at(path, store.layout, store.read_commit, up_to=seq)
