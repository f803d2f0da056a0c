"""A disk that refuses to move the directory of a deleted dot: a typed error, and it goes on later."""

import os

import pytest

from dmsync.engine import dots
from dmsync.errors import StorageFailed


def test_a_move_to_the_trash_that_fails_is_told_and_made_up_for(shop, dot, data, monkeypatch):
    (data / "a").write_text("one")
    shop.commit(dot, "first")
    directory = shop.store.layout.dot_dir(dot.dot)
    real = os.rename

    def refuse(source: str, target: str) -> None:
        if source == directory:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with pytest.raises(StorageFailed, match="to the trash"):
        dots.delete_dot(shop.store, "shop")
    monkeypatch.undo()
    assert shop.store.catalog.dots() == [] and os.path.isdir(directory)
    dots.finish_deletions(shop.store)
    assert not os.path.exists(directory)
