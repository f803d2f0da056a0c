"""Objects kept in a dict: the interface of ObjectStore and PackWriter, for tests of the engine."""

from collections.abc import Iterable, Iterator, Sequence

from dmsync.core.ids import Kind, ObjectId, object_id
from dmsync.errors import ObjectMissing
from dmsync.storage.chunk_forms import NewChunk, PreparedChunk


class MemoryStore:
    def __init__(self) -> None:
        self.objects: dict[tuple[Kind, ObjectId], bytes] = {}
        self.puts: list[tuple[Kind, ObjectId, ObjectId | None, bool]] = []
        self.reads = 0

    def read(self, kind: Kind, oid: ObjectId) -> bytes:
        self.reads += 1
        try:
            return self.objects[kind, oid]
        except KeyError:
            raise ObjectMissing(f"{kind.name} {oid.hex()[:12]} is missing") from None

    def read_many(self, kind: Kind, ids: Iterable[ObjectId]) -> Iterator[bytes]:
        for oid in ids:
            yield self.read(kind, oid)

    def read_page(self, page: ObjectId) -> bytes:
        return self.read(Kind.PAGE, page)

    def writer(self) -> "MemoryWriter":
        return MemoryWriter(self)


class MemoryWriter:
    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.bytes_written = 0

    def put(
        self, kind: Kind, data: bytes, *, base: ObjectId | None = None, similar: bool = False
    ) -> ObjectId:
        oid = object_id(kind, data)
        self.store.puts.append((kind, oid, base, similar))
        if (kind, oid) not in self.store.objects:
            self.store.objects[kind, oid] = bytes(data)
            self.bytes_written += len(data)
        return oid

    def prepare(self, runs: Sequence[Sequence[NewChunk]], *, similar: bool) -> list[PreparedChunk]:
        return [PreparedChunk(chunk.id, b"", 0, bytes(chunk.data)) for run in runs for chunk in run]

    def put_prepared(self, chunks: Sequence[PreparedChunk]) -> None:
        for chunk in chunks:
            assert self.put(Kind.CHUNK, chunk.data) == chunk.id

    def write_page(self, data: bytes, base: ObjectId | None) -> ObjectId:
        return self.put(Kind.PAGE, data, base=base)

    def __enter__(self) -> "MemoryWriter":
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def seal(self) -> None:
        return None
