"""What a namespace may take: before, during and after a push, and what is left of cut ones."""

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmsync.core.events import QuotaSet
from dmsync.core.ids import DotId
from dmsync.engine import quotas
from dmsync.engine.quotas import Allowance, claim_unmade, drop_abandoned, used_bytes
from dmsync.errors import NetworkError, QuotaExceeded
from dmsync.storage.quarantine import Quarantine
from tests.support.streams import Line
from tests.support.sync_stores import Everything, Pair, noise


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    made = Pair(str(tmp_path))
    made.access = Everything(default_namespace="alice")
    yield made
    made.close()


def set_quota(pair: Pair, bytes_max: int | None, namespace: str = "alice") -> None:
    pair.remote.append(QuotaSet(namespace, bytes_max))


def parts(pair: Pair, dot: DotId) -> list[str]:
    directory = Path(pair.remote.layout.dot_dir(dot), "quarantine")
    return [path.name for path in directory.glob("*.part")] if directory.exists() else []


def test_a_push_within_the_quota_goes_through_and_is_counted(pair: Pair) -> None:
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": noise(100_000)})
    set_quota(pair, 1 << 20)
    pair.push(dot, remote_namespace="alice")
    used = used_bytes(pair.remote, "alice")
    assert 100_000 < used < 300_000
    assert used_bytes(pair.remote, "bob") == 0


@pytest.mark.parametrize("size", [300_000, 6_000_000])
def test_a_push_that_does_not_fit_is_refused_and_leaves_nothing(pair: Pair, size: int) -> None:
    """Small pushes come at once, large ones after an inventory; neither stays in quarantine."""
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": noise(size)})
    set_quota(pair, 200_000)
    outcome = pair.try_push(dot, remote_namespace="alice")
    assert isinstance(outcome.error, QuotaExceeded)
    assert outcome.error.exit_code == 1 and not outcome.error.retryable
    assert pair.remote.catalog.dot(dot) is None and parts(pair, dot) == []
    assert used_bytes(pair.remote, "alice") < 200_000
    other = pair.local.create_dot("pears")
    pair.local.commit(other, {"a": noise(size, 2)})
    pair.push(other, remote_namespace="bob", remote_name="pears")
    set_quota(pair, None)
    pair.push(dot, remote_namespace="alice")


def test_a_namespace_that_is_full_is_told_before_anything_is_sent(pair: Pair) -> None:
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": noise(50_000)})
    pair.push(dot, remote_namespace="alice")
    set_quota(pair, 1000)
    pair.local.commit(dot, {"a": noise(3_000_000, 2)})
    outcome = pair.try_push(dot, remote_namespace="alice")
    assert isinstance(outcome.error, QuotaExceeded)
    assert parts(pair, dot) == []


def test_more_objects_than_could_fit_are_refused_by_their_number(pair: Pair) -> None:
    set_quota(pair, 1000)
    allowance = Allowance(pair.remote, "alice")
    allowance.check_announced(100)
    with pytest.raises(QuotaExceeded):
        allowance.check_announced(1000)


def test_pushes_side_by_side_exceed_by_no_more_than_what_is_not_asked_again(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each asks the disk, so that what others brought meanwhile counts."""
    set_quota(pair, 10_000_000)
    ours, theirs = Allowance(pair.remote, "alice"), Allowance(pair.remote, "alice")
    dot = pair.remote.create_dot(namespace="alice")
    packs = Path(pair.remote.layout.dot_dir(dot), "packs")
    packs.mkdir(parents=True, exist_ok=True)
    (packs / "x.pack").write_bytes(bytes(9_000_000))
    assert ours.is_measure_due(quotas.RECHECK_BYTES)
    ours.measure()
    (packs / "y.pack").write_bytes(bytes(2_000_000))
    assert theirs.is_measure_due(quotas.RECHECK_BYTES)
    with pytest.raises(QuotaExceeded):
        theirs.measure()


def cut_push(pair: Pair, namespace: str = "alice") -> DotId:
    """A large first push that ends in the middle: its dot was never made."""
    dot = pair.local.create_dot()
    pair.local.commit(dot, {"a": noise(8_000_000)})
    outcome = pair.try_push(dot, remote_namespace=namespace, line=lambda: Line(cut_after=6_000_000))
    assert isinstance(outcome.error, NetworkError)
    assert pair.remote.catalog.dot(dot) is None
    return dot


def test_what_a_cut_push_left_counts_for_whom_it_was_meant(pair: Pair) -> None:
    dot = cut_push(pair)
    assert parts(pair, dot)
    assert used_bytes(pair.remote, "alice") > 1_000_000
    assert used_bytes(pair.remote, "bob") == 0
    summary = pair.push(dot, remote_namespace="alice")
    assert summary.resumed_bytes > 0


def test_nobody_completes_what_somebody_else_sent(pair: Pair) -> None:
    """The same dot id for another namespace: what is in quarantine goes."""
    dot = cut_push(pair)
    claim_unmade(pair.remote, dot, "bob")
    assert parts(pair, dot) == []
    assert used_bytes(pair.remote, "bob") < 100_000


def test_abandoned_quarantine_goes_and_what_lives_stays(pair: Pair) -> None:
    dot = cut_push(pair)
    assert drop_abandoned(pair.remote) == 0, "it is young"
    held = Quarantine(pair.remote.objects(dot))  # a session that has taken it up again
    held.sync()
    assert drop_abandoned(pair.remote, older_than_s=-60) == 0, "a session has it"
    held.close()
    assert drop_abandoned(pair.remote, older_than_s=-60) > 1_000_000
    assert parts(pair, dot) == []


def test_a_full_namespace_stops_nobody_else(pair: Pair) -> None:
    set_quota(pair, 1)
    dots = [pair.local.create_dot(f"dot{number}") for number in range(2)]
    for number, dot in enumerate(dots):
        pair.local.commit(dot, {"a": noise(100_000, number)})
    assert isinstance(
        pair.try_push(dots[0], remote_namespace="alice", remote_name="dot0").error, QuotaExceeded
    )
    pair.push(dots[1], remote_namespace="bob", remote_name="dot1")


def test_files_that_go_while_they_are_counted_do_no_harm(pair: Pair) -> None:
    dot = pair.remote.create_dot(namespace="alice")
    directory = Path(pair.remote.layout.dot_dir(dot), "packs")
    directory.mkdir(parents=True, exist_ok=True)
    stop = threading.Event()

    def churn() -> None:
        while not stop.is_set():
            (directory / "x").write_bytes(b"x")
            os.unlink(directory / "x")

    thread = threading.Thread(target=churn)
    thread.start()
    try:
        deadline_s = time.monotonic() + 0.3
        while time.monotonic() < deadline_s:
            assert used_bytes(pair.remote, "alice") < 1_000_000
    finally:
        stop.set()
        thread.join()
