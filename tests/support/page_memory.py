"""Pages kept in a dict: a PageReader and PageWriter for tests of the pure page trees."""

from dmsync.core.ids import Kind, ObjectId, object_id


class PageMemory:
    def __init__(self) -> None:
        self.pages: dict[ObjectId, bytes] = {}
        self.reads = 0

    def read_page(self, page: ObjectId) -> bytes:
        self.reads += 1
        return self.pages[page]

    def write_page(self, data: bytes, base: ObjectId | None) -> ObjectId:
        assert base is None or base in self.pages
        page = object_id(Kind.PAGE, data)
        self.pages[page] = data
        return page
