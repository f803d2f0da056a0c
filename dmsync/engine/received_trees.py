"""What a directory that a peer sent may not be, beyond what decoding its pages refuses.

The checks read what is new and, where a page that was here before has come to another place, the
first and the last name below it: cost follows the change.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from dmsync.core.ids import ObjectId
from dmsync.core.objects import PATH_BYTES_MAX, Entry, EntryKind, Layout
from dmsync.core.pages import Child, Page
from dmsync.engine.content_checks import check_size
from dmsync.engine.safe_files import is_temporary
from dmsync.errors import BadObject

ReadPage = Callable[[ObjectId], Page]


class Place(NamedTuple):
    """Where a directory page stands: its level, the name it begins with, its number of entries,
    and the name that all below it come before (None: there is none)."""

    level: int
    key: bytes
    weight: int
    before: bytes | None


def children_places(page: Page, before: bytes | None) -> Iterable[tuple[ObjectId, Place]]:
    """The places of an inner page's children."""
    children: tuple[Child, ...] = page.items
    for number, child in enumerate(children):
        end = children[number + 1].key if number + 1 < len(children) else before
        yield child.page, Place(page.level - 1, child.key, child.weight, end)


def check_order(
    root: ObjectId,
    new_pages: Mapping[ObjectId, Page],
    vouched: Mapping[ObjectId, Place],
    read_page: ReadPage,
) -> None:
    """Check that the names of one directory are in order and distinct over all its pages, and that
    inner pages say of those below what is so: lookups go by it, and two entries of one name would
    be two truths.

    `new_pages`: those that nobody has checked. `vouched`: where others stood in a directory that
    was checked. All else is read.

    Raises:
        BadObject: they are not.
    """
    page = new_pages.get(root)
    if page is None:
        return
    waiting: list[tuple[ObjectId, Place]] = []
    if page.level > 0:
        waiting += children_places(page, None)
    while waiting:
        page_id, place = waiting.pop()
        page = new_pages.get(page_id)
        if page is None:
            if not _is_vouched(vouched.get(page_id), place):
                _check_known(page_id, place, read_page)
            continue
        _check_page(page, place)
        if page.level > 0:
            waiting += children_places(page, place.before)


def _is_vouched(was: Place | None, place: Place) -> bool:
    if was is None or was[:3] != place[:3]:
        return False
    return place.before is None or (was.before is not None and was.before <= place.before)


def _check_page(page: Page, place: Place) -> None:
    first, last, weight = _ends(page)
    if page.level != place.level:
        raise BadObject("page levels do not descend by one")
    if first != place.key or weight != place.weight:
        raise BadObject("a directory page is not what the page above says of it")
    if place.before is not None and last >= place.before:
        raise BadObject("directory entries are not sorted and distinct")


def _ends(page: Page) -> tuple[bytes, bytes, int]:
    """First and last name (of an inner page: last key) and the number of entries."""
    first, last = page.items[0], page.items[-1]
    if page.level > 0:
        return first.key, last.key, sum(child.weight for child in page.items)
    return first.name, last.name, len(page.items)


def _check_known(page_id: ObjectId, place: Place, read_page: ReadPage) -> None:
    """A page that was checked where it stood before: what is left is how it stands here."""
    page = read_page(page_id)
    _check_page(page, place)
    while page.level > 0:
        page = read_page(page.items[-1].page)
    if place.before is not None and _ends(page)[1] >= place.before:
        raise BadObject("directory entries are not sorted and distinct")


class ReceivedNames:
    """Checks the entries of one received tree, each with its path from the dot's root."""

    def __init__(self) -> None:
        self._group_kinds: dict[bytes, EntryKind] = {}

    def check(self, path: bytes, entry: Entry) -> None:
        """Raises BadObject."""
        if is_temporary(entry.name):
            raise BadObject("a name that dm keeps for files it is writing")
        if len(path) > PATH_BYTES_MAX:
            raise BadObject(f"a path longer than {PATH_BYTES_MAX} bytes")
        if entry.hardlink:
            self._check_group(path, entry)
        if entry.layout is Layout.ZERO or entry.layout is Layout.SINGLE:
            check_size(entry)

    def _check_group(self, path: bytes, entry: Entry) -> None:
        if entry.kind is EntryKind.DIRECTORY:
            raise BadObject("a directory is in a hardlink group")
        if entry.hardlink > path:
            raise BadObject("a hardlink group is not named by its first path")
        kind = self._group_kinds.setdefault(entry.hardlink, entry.kind)
        if kind is not entry.kind:
            raise BadObject("a hardlink group of several kinds")
