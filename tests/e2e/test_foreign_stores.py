"""Whose store and whose settings are used: one's own, and through sudo the caller's store."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, MakeCluster

STRANGER = 54321
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make another user's store")


@pytest.fixture
def foreign(make_cluster: MakeCluster, tmp_path: Path) -> Iterator[Cluster]:
    """A store with a hook, all of it another user's."""
    cluster = make_cluster("foreign")
    cluster.init("app", {"f": "x"})
    config = cluster.home / "config.toml"
    config.write_text(f'[dot.app.hooks]\nquiesce = "touch {tmp_path / "ran"}"\n')
    config.chmod(0o600)
    for above, folders, files in os.walk(cluster.home):
        for name in (".", *folders, *files):
            os.chown(os.path.join(above, name), STRANGER, STRANGER)
    yield cluster
    assert not (tmp_path / "ran").exists()


def test_root_runs_nothing_of_another_users_store(foreign: Cluster) -> None:
    foreign.refused("commit", "-m", "x", code=2, saying="only your own is read")
    (foreign.home / "config.toml").unlink()
    foreign.refused("commit", "-m", "x", code=12, saying=f"belongs to user {STRANGER}")
    foreign.refused("list", code=12)


def test_root_through_sudo_uses_the_callers_store_without_his_settings(foreign: Cluster) -> None:
    foreign.environment["SUDO_UID"] = str(STRANGER)
    foreign.refused("commit", "-m", "x", code=2, saying="only your own is read")
    (foreign.home / "config.toml").unlink()
    foreign.commit("by sudo")
    for other in (str(STRANGER + 1), "0x1", "-1", ""):
        foreign.environment["SUDO_UID"] = other
        foreign.refused("list", code=12)
