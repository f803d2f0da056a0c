"""How much the dots of a namespace may take on this store: set, measured, kept by every push.

What counts is what lies on the disk: packs, their index, and records in quarantine, whether their
dot has been made yet or not. A push is refused before it brings anything where nothing fits any
more, and while it brings it as soon as the disk holds too much; what it brought is then thrown
away. The disk is asked again every RECHECK_BYTES, so that pushes side by side, in other processes
too, exceed a quota by that much each at most.
"""

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from dmsync.core.events import QuotaSet
from dmsync.core.ids import DotId
from dmsync.core.names import check_namespace
from dmsync.engine.ports import SyncStore
from dmsync.engine.store import Store
from dmsync.errors import NotFound, QuotaExceeded
from dmsync.storage.durable import lock_exclusively, storage_errors
from dmsync.storage.layout import Layout
from dmsync.storage.quarantine import PART_SUFFIX

RECHECK_BYTES: Final = 4 << 20
ABANDONED_AFTER_S: Final = 7 * 86_400.0
"""A push that was cut is taken up again within days, or never. A clock that jumps costs no more
than sending again what was thrown away."""
_RECORD_BYTES_MIN: Final = 4
"""No record is smaller: as many objects as do not fit even so need not be sent."""
_CLAIM: Final = "namespace"
"""In the quarantine of a dot that has not been made: for whose namespace it is to be made."""


@dataclass(frozen=True)
class Usage:
    """What a namespace may take (None: as much as fits) and takes, in bytes."""

    namespace: str
    bytes_max: int | None
    bytes_used: int


# --- setting -------------------------------------------------------------------------------------


def set_quota(store: Store, namespace: str, bytes_max: int) -> None:
    """Bound what a namespace may take from now on; what is there stays. Raises InvalidName."""
    check_namespace(namespace)
    with store.transaction("quota-set") as tx:
        if store.catalog.quota(namespace) != bytes_max:
            tx.append(QuotaSet(namespace, bytes_max))


def remove_quota(store: Store, namespace: str) -> None:
    """Bound it no longer. Raises NotFound."""
    with store.transaction("quota-rm") as tx:
        if store.catalog.quota(namespace) is None:
            raise NotFound(f"namespace {namespace} has no quota", hint="dm quota list")
        tx.append(QuotaSet(namespace, None))


def list_quotas(store: Store) -> list[Usage]:
    """Every namespace that has a quota or a dot, by name."""
    limits = dict(store.catalog.quotas())
    names = set(limits) | {row.namespace for row in store.catalog.dots()}
    return [Usage(name, limits.get(name), used_bytes(store, name)) for name in sorted(names)]


# --- measuring -----------------------------------------------------------------------------------


def used_bytes(store: SyncStore, namespace: str) -> int:
    """What packs and quarantine of the namespace's dots take, dots to be made included."""
    catalog = store.catalog
    layout = catalog.layout
    total = sum(_dot_bytes(layout, row.dot) for row in catalog.dots() if row.namespace == namespace)
    claimed = (dot for dot in _unmade_dots(store) if _claim(layout, dot) == namespace)
    return total + sum(_dot_bytes(layout, dot) for dot in claimed)


def _dot_bytes(layout: Layout, dot: DotId) -> int:
    """The dot's own files (the index of its packs), packs and quarantine."""
    directory = layout.dot_dir(dot)
    places = (directory, *(os.path.join(directory, name) for name in ("packs", "quarantine")))
    return sum(map(_files_bytes, places))


def _files_bytes(path: str) -> int:
    total = 0
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                try:
                    if entry.is_file(follow_symlinks=False):
                        total += entry.stat(follow_symlinks=False).st_size
                except FileNotFoundError:
                    continue  # promoted, joined or thrown away a moment ago
    except FileNotFoundError:
        pass
    return total


def trashed_bytes(store: SyncStore, trash: str) -> int:
    """What a deleted dot brings along when it comes back."""
    return _files_bytes(os.path.join(store.catalog.layout.trashed_dot_dir(trash), "packs"))


def _unmade_dots(store: SyncStore) -> Iterator[DotId]:
    """Dots that have a directory and are not in the catalog: somebody began to push them."""
    try:
        names = os.listdir(store.catalog.layout.dots_dir)
    except FileNotFoundError:
        return
    known = {row.dot for row in store.catalog.dots(include_deleted=True)}
    for name in names:
        try:
            dot = DotId(bytes.fromhex(name))
        except ValueError:
            continue
        if dot not in known:
            yield dot


# --- dots that are to be made --------------------------------------------------------------------


def _claim_file(layout: Layout, dot: DotId) -> str:
    return os.path.join(layout.dot_dir(dot), "quarantine", _CLAIM)


def _claim(layout: Layout, dot: DotId) -> str | None:
    try:
        with open(_claim_file(layout, dot), encoding="ascii", errors="replace") as file:
            return file.read(256)
    except OSError:
        return None


def claim_unmade(store: SyncStore, dot: DotId, namespace: str) -> None:
    """Note for whom a dot is to be made before records of it are kept.

    What a cut push left there for another namespace is thrown away: nobody may complete a dot
    with objects that somebody else has sent.
    """
    layout = store.catalog.layout
    path = _claim_file(layout, dot)
    if _claim(layout, dot) not in (None, namespace):
        _drop_parts(os.path.dirname(path), older_than_ns=None)
    with storage_errors(f"writing {path}"):
        os.makedirs(os.path.dirname(path), 0o700, exist_ok=True)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC
        with open(os.open(path, flags, 0o600), "w", encoding="ascii") as file:
            file.write(namespace)


def forget_claim(store: SyncStore, dot: DotId) -> None:
    """The dot has been made: the catalog says whose it is."""
    try:
        os.unlink(_claim_file(store.catalog.layout, dot))
    except OSError:
        pass  # it says nothing any more: dots in the catalog are not asked for one


# --- what nobody takes up again ------------------------------------------------------------------


def drop_abandoned(store: SyncStore, older_than_s: float = ABANDONED_AFTER_S) -> int:
    """Throw away what cut pushes left in quarantine and no session has had for so long.

    Returns how many bytes went. Sessions that live keep what they have, whatever its age.
    """
    layout = store.catalog.layout
    deadline_ns = time.time_ns() - int(older_than_s * 1e9)
    dots = [row.dot for row in store.catalog.dots()]
    return sum(
        _drop_parts(os.path.join(layout.dot_dir(dot), "quarantine"), older_than_ns=deadline_ns)
        for dot in (*dots, *_unmade_dots(store))
    )


def _drop_parts(directory: str, *, older_than_ns: int | None) -> int:
    try:
        names = os.listdir(directory)
    except FileNotFoundError:
        return 0
    parts = (os.path.join(directory, name) for name in names if name.endswith(PART_SUFFIX))
    return sum(_drop_part(path, older_than_ns) for path in parts)


def _drop_part(path: str, older_than_ns: int | None) -> int:
    """Bytes that went: none of a part that a session holds, or that is younger."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return 0
    try:
        status = os.fstat(fd)
        if older_than_ns is not None and status.st_mtime_ns > older_than_ns:
            return 0
        if not lock_exclusively(fd, wait=False) or not os.fstat(fd).st_nlink:
            return 0
        os.unlink(path)
        return status.st_size
    except FileNotFoundError:
        return 0
    finally:
        os.close(fd)


# --- keeping to it -------------------------------------------------------------------------------


class Allowance:
    """What one push may still bring into a namespace."""

    def __init__(self, store: SyncStore, namespace: str) -> None:
        self._store = store
        self._namespace = namespace
        self._bytes_max = store.catalog.quota(namespace)
        self._since_check = 0
        self._left = 0
        self.measure()

    def measure(self) -> None:
        """Ask the disk. Raises QuotaExceeded when it holds more than it may."""
        self._since_check = 0
        if self._bytes_max is None:
            return
        self._left = self._bytes_max - used_bytes(self._store, self._namespace)
        if self._left < 0:
            raise self._exceeded()

    def check_coming(self, coming_bytes: int) -> None:
        """Raises QuotaExceeded when so much more does not fit."""
        if self._bytes_max is not None and coming_bytes > self._left:
            raise self._exceeded()

    def check_announced(self, objects_count: int) -> None:
        """Refuse before it comes what cannot fit however small it is. Raises QuotaExceeded.

        What a plan says of sizes is about decoded objects, and may be thousands of times as much
        as comes: only the number of records is a lower bound.
        """
        if self._bytes_max is not None and objects_count * _RECORD_BYTES_MIN > self._left:
            raise self._exceeded()

    def is_measure_due(self, arrived_bytes: int) -> bool:
        """Count what arrived. True when the disk must be asked before more is taken."""
        self._since_check += arrived_bytes
        if self._bytes_max is None:
            return False
        return self._since_check >= RECHECK_BYTES or self._since_check > self._left

    def _exceeded(self) -> QuotaExceeded:
        return QuotaExceeded(
            f"the quota of namespace {self._namespace} is used up: {self._bytes_max} bytes",
            hint="ask whoever runs the server for more, or for what may go there",
            namespace=self._namespace,
            bytes_max=self._bytes_max,
        )
