"""What most tests of the use cases start from: a store, and a dot attached to a directory."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from dmsync.storage.catalog import DotRow
from tests.support.working_store import Workshop


@pytest.fixture
def shop(tmp_path: Path) -> Iterator[Workshop]:
    workshop = Workshop(tmp_path / "home")
    yield workshop
    workshop.close()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def dot(shop: Workshop, data: Path) -> DotRow:
    return shop.attach("shop", data)
