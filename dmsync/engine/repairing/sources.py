"""Where on this machine an object may be that a dot has lost."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, suppress

from dmsync.core.ids import Kind, ObjectId, object_id
from dmsync.core.objects import Entry, EntryKind, commit_from_bytes
from dmsync.core.pages import ZERO_RUN, file_spans, find_path
from dmsync.engine.fsck import Harm
from dmsync.engine.repairing.packs import damaged_packs
from dmsync.engine.safe_files import TreeDirectories, open_file, open_tree
from dmsync.engine.store import Store
from dmsync.engine.trees import TreePlace, place_of
from dmsync.errors import DmError
from dmsync.storage.catalog import DotRow
from dmsync.storage.object_store import ObjectStore
from dmsync.storage.pack_rescue import HarmedPack, Rescue
from dmsync.storage.quarantine import PART_SUFFIX


class LocalSources:
    """Objects out of what was set aside, other dots, the trash, records that came in and were
    never promoted, the catalog's copies of commits, and working trees. Close it."""

    def __init__(self, store: Store, objects: ObjectStore, dot: DotRow) -> None:
        self._store = store
        self._objects = objects
        self._dot = dot
        self._opened = ExitStack()
        self._others: list[ObjectStore] | None = None
        self._rescue: Rescue | None = None

    def close(self) -> None:
        self._opened.close()

    def heal(self, harm: Harm) -> int:
        """Put what can be found into the dot, durably; returns how many objects that were."""
        objects = self._objects
        count = 0
        with objects.writer() as writer:
            for oid, kind in harm.objects.items():
                data = self._find(kind, oid)
                if data is None and kind is Kind.CHUNK:
                    data = self._in_trees(oid, harm)
                if data is not None and object_id(kind, data) == oid:
                    writer.put(kind, data)
                    count += 1
            writer.seal()
        return count

    def _find(self, kind: Kind, oid: ObjectId) -> bytes | None:
        if kind is Kind.COMMIT:
            row = self._store.catalog.commit(self._dot.dot, oid)
            if row is not None and object_id(kind, row.payload) == oid:
                return row.payload
        found = self._set_aside().find(kind, oid)
        if found is not None:
            return found
        for objects in self._other_dots():
            with suppress(DmError):
                return objects.read(kind, oid)
        return None

    # --- other dots ---------------------------------------------------------------------------

    def _other_dots(self) -> list[ObjectStore]:
        if self._others is None:
            self._others = []
            for dot in self._store.catalog.dots():
                if dot.dot != self._dot.dot:
                    with suppress(DmError):
                        self._others.append(self._store.objects(dot.dot))
            for path in _directories(self._store.layout.trash_dir):
                with suppress(DmError):
                    self._others.append(self._opened.enter_context(ObjectStore(path)))
        return self._others

    # --- what was set aside, or never promoted -------------------------------------------------

    def _set_aside(self) -> Rescue:
        if self._rescue is None:
            packs = []
            for path in self._harmed_paths():
                with suppress(DmError):
                    pack = HarmedPack(path)
                    self._opened.callback(pack.close)
                    packs.append(pack)
            sources = [self._objects.sealed]
            self._rescue = Rescue(packs, sources)
            if not all(pack.has_table for pack in packs):
                for _ in self._rescue.sound_records():
                    pass  # which names what the packs without a table have
        return self._rescue

    def _harmed_paths(self) -> Iterator[str]:
        for dot_dir in _directories(self._store.layout.dots_dir):
            yield from damaged_packs(dot_dir)
        quarantine = self._store.layout.quarantine_dir(self._dot.dot)
        with suppress(FileNotFoundError):
            for name in sorted(os.listdir(quarantine)):
                if name.endswith(PART_SUFFIX):
                    yield os.path.join(quarantine, name)

    # --- working trees ------------------------------------------------------------------------

    def _in_trees(self, chunk: ObjectId, harm: Harm) -> bytes | None:
        """The chunk out of a working tree's file of the path that holds it, at its place there."""
        objects = self._objects
        for commit, path in harm.paths.get(chunk, ()):
            with suppress(DmError):
                root = commit_from_bytes(objects.read_commit(commit), trusted=True).root
                entry = find_path(objects, root, path)
                if entry is None or entry.kind is not EntryKind.FILE:
                    continue
                for offset, length in _places_in(objects, entry, chunk):
                    for place in self._places():
                        data = _read_part(place, path, offset, length)
                        if data is not None and object_id(Kind.CHUNK, data) == chunk:
                            return data
        return None

    def _places(self) -> Iterator[TreePlace]:
        for branch in self._store.catalog.branches(self._dot.dot):
            place = place_of(self._store, self._dot.dot, branch.short_name)
            if place is not None:
                yield place


def _directories(path: str) -> list[str]:
    try:
        return [os.path.join(path, name) for name in sorted(os.listdir(path))]
    except OSError:
        return []


def _places_in(objects: ObjectStore, entry: Entry, chunk: ObjectId) -> Iterator[tuple[int, int]]:
    """Offset and length of the chunk in a file, in bytes."""
    offset = 0
    for span in file_spans(objects, entry):
        if span.chunk == chunk and span.chunk != ZERO_RUN:
            yield offset, span.length
        offset += span.length


def _read_part(place: TreePlace, path: bytes, offset: int, length: int) -> bytes | None:
    """Bytes of a file of a working tree, if there is one at that path; never through a link."""
    if place.subdot is not None:
        subdot, _, path = path.partition(b"/")
        if subdot != place.subdot:
            return None
    directory, _, name = path.rpartition(b"/")
    try:
        root = open_tree(place.path)
    except DmError:
        return None
    directories = TreeDirectories(root)
    try:
        fd = open_file(name, directories.open(directory))
        try:
            return os.pread(fd, length, offset)
        finally:
            os.close(fd)
    except OSError:
        return None
    finally:
        directories.close()
        os.close(root)
