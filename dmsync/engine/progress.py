"""How every use case tells how far its work has come; showing it is a surface's affair."""

from collections.abc import Iterable
from typing import Final, Protocol


class Progress(Protocol):
    """Told how long work goes on, from any thread and as often as is handy: it must be cheap."""

    def phase(
        self,
        name: str,
        *,
        bytes_total: int | None = None,
        items_total: int | None = None,
        sizes: Iterable[int] | None = None,
    ) -> None:
        """Another part of the work begins and counts from nothing, to the totals where they are
        known. A verb: `reading`. `sizes` are the bytes of all items where finding them costs: it
        is gone through in another thread, and only when the work is long and somebody looks."""

    def reached(self, bytes_done: int, items_done: int = 0) -> None:
        """So many bytes, and so many files or objects, of this phase are done."""


class Silent:
    """Progress that nobody watches."""

    def phase(
        self,
        name: str,
        *,
        bytes_total: int | None = None,
        items_total: int | None = None,
        sizes: Iterable[int] | None = None,
    ) -> None:
        return None

    def reached(self, bytes_done: int, items_done: int = 0) -> None:
        return None


SILENT: Final = Silent()
