"""A store opens although what is derived in it is lost or wrong, whatever comes together."""

import os
import sqlite3
from contextlib import closing
from pathlib import Path

from tests.support.working_store import Workshop


def test_a_lost_catalog_beside_a_wrong_index(tmp_path: Path) -> None:
    """Folding the log reads commits, and a commit that the index lacks has it built anew: before
    there is a catalog to tell what is kept of the dot."""
    (tmp_path / "tree").mkdir()
    shop = Workshop(tmp_path / "home")
    dot = shop.attach("apples", tmp_path / "tree")
    (tmp_path / "tree" / "file").write_text("one")
    shop.commit(dot, "first")
    dot_dir = shop.store.layout.dot_dir(dot.dot)
    shop.close()
    with closing(sqlite3.connect(os.path.join(dot_dir, "index.sqlite"))) as index:
        index.execute("DELETE FROM objects")
        index.commit()
    for name in ("catalog.sqlite", "catalog.sqlite-wal", "catalog.sqlite-shm"):
        (tmp_path / "home" / name).unlink(missing_ok=True)
    shop = Workshop(tmp_path / "home")
    assert shop.messages(dot) == ["first"]
    shop.close()
