"""A running transfer proves that it lives; one whose process was killed is told as cut."""

import os
import subprocess
import sys
from pathlib import Path

from dmsync.engine.transfers import TransferLog, transfer_status
from dmsync.errors import NetworkError
from dmsync.storage.layout import Layout
from tests.support.sync_stores import FakeStore, Pair, noise

KILLED = """
import sys, time
from tests.support.sync_stores import FakeStore
from dmsync.engine.transfers import TransferLog
log = TransferLog(FakeStore(sys.argv[1]), direction="push", remote="o", command="push", actor="a")
log.record_start()
print("started", flush=True)
time.sleep(60)
"""


def log_of(store: FakeStore) -> TransferLog:
    return TransferLog(store, direction="push", remote="o", command="push", actor="a")


def statuses(store: FakeStore) -> list[str]:
    """Newest first."""
    return [transfer_status(store.layout, row) for row in store.catalog.transfers()]


def proofs(layout: Layout) -> int:
    return len(os.listdir(layout.transfers_dir))


def test_a_transfer_is_running_until_it_is_done(tmp_path: Path) -> None:
    store = FakeStore(str(tmp_path / "home"))
    log = log_of(store)
    log.record_start()
    assert statuses(store) == ["running"]
    log.record_failure(NetworkError("gone"))
    assert statuses(store) == ["failed"]
    assert proofs(store.layout) == 0
    store.close()


def test_a_killed_transfer_is_cut_and_its_proof_is_swept(tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    store = FakeStore(home)
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, home], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "started\n"
        store.catalog.refresh()
        assert statuses(store) == ["running"]
        other.kill()
    assert statuses(store) == ["cut"]
    assert proofs(store.layout) == 1
    log = log_of(store)
    log.record_start()
    assert statuses(store) == ["running", "cut"]
    assert proofs(store.layout) == 1
    log.close()
    assert statuses(store) == ["cut", "cut"]
    store.close()


def test_a_large_push_leaves_no_proof(tmp_path: Path) -> None:
    pair = Pair(str(tmp_path))
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": noise(2_000_000)})
    pair.push(dot)
    for store in (pair.local, pair.remote):
        assert statuses(store) == ["done"]
        assert proofs(store.layout) == 0
    pair.close()
