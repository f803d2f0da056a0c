"""Sealed packs open for reading: a bounded number of files, records by their places."""

import os
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from operator import attrgetter
from typing import Final

from dmsync.core.records import Record
from dmsync.errors import Corruption
from dmsync.storage.durable import storage_errors
from dmsync.storage.packs import Place, RecordFile

OPEN_PACKS_MAX: Final = 256
"""File descriptors kept for reading, of the 1,024 a process usually has. One window of chains
takes turns among the packs of many commits."""


_offset = attrgetter("offset")


class PackFiles:
    """The files of one packs directory. For one thread at a time."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._open: OrderedDict[str, RecordFile] = OrderedDict()
        self._last: RecordFile | None = None
        """The only one that may read ahead."""

    def opened(self, name: str) -> RecordFile:
        """A pack, valid until the next call. Raises Corruption when it is gone."""
        opened = self._opened(name)
        if opened is not self._last:
            if self._last is not None:
                self._last.rest()
            self._last = opened
        return opened

    def _opened(self, name: str) -> RecordFile:
        opened = self._open.get(name)
        if opened is not None:
            self._open.move_to_end(name)
            return opened
        with storage_errors(f"opening pack {name}"):
            try:
                path = os.path.join(self._directory, name)
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError as exc:
                raise Corruption(f"pack {name} is missing", pack=name) from exc
        self._open[name] = opened = RecordFile(fd, name)
        if len(self._open) > OPEN_PACKS_MAX:
            self._open.popitem(last=False)[1].close()
        return opened

    def load_many(self, places: Iterable[Place]) -> dict[Place, Record]:
        """The records at these places, neighbours read together; what cannot be read is left
        out."""
        in_pack: dict[str, list[Place]] = {}
        for place in places:
            in_pack.setdefault(place.pack, []).append(place)
        found: dict[Place, Record] = {}
        for pack, named in in_pack.items():
            named.sort(key=_offset)
            with suppress(Corruption, OSError):
                records = self.opened(pack).records_nearby([place.offset for place in named])
                for place, record in zip(named, records, strict=True):
                    if record is not None:
                        found[place] = record
        return found

    def close(self) -> None:
        while self._open:
            self._open.popitem()[1].close()
