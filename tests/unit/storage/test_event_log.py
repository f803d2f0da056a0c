import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from dmsync.core import events as ev
from dmsync.errors import Corruption, DmError, StorageFailed, StorageFull
from dmsync.storage import event_log
from dmsync.storage.event_log import START, EventLog
from tests.support.event_histories import (
    CommitShelf,
    drop_catalog,
    make_store,
    open_catalog,
    start_python,
)


def operation(seq, *, text="ssh://host", count=1):
    events = tuple(ev.RemoteAdded(f"r{seq}-{n}", text) for n in range(count))
    return ev.Operation(seq, -seq, seq.to_bytes(16, "big"), "test", "me", events)


def write(log, operations, at=START):
    for op in operations:
        at = log.append(op, at)
    return at


@pytest.fixture
def log(tmp_path):
    return EventLog(str(tmp_path))


def segment(tmp_path, number=1):
    return tmp_path / f"{number:08}.log"


def test_what_is_appended_is_read_in_order(log):
    ops = [operation(1, count=3), operation(4), operation(5)]
    end = write(log, ops)
    read = list(log.read())
    assert [op for op, _ in read] == ops and read[-1][1] == end
    assert [op for op, _ in log.read(read[0][1])] == ops[1:]
    assert log.holds(end) and not log.reaches_past(end)


def test_segments_rotate_and_a_missing_one_is_named(log, tmp_path, monkeypatch):
    monkeypatch.setattr(event_log, "SEGMENT_BYTES_MAX", 300)
    ops = [operation(seq) for seq in range(1, 12)]
    end = write(log, ops)
    assert len(log.segments()) > 3 and [op for op, _ in log.read()] == ops and log.holds(end)
    segment(tmp_path, 2).unlink()
    with pytest.raises(Corruption, match=r"00000002\.log is missing"):
        list(log.read())


def test_swapped_segment_is_corruption(log, tmp_path, monkeypatch):
    monkeypatch.setattr(event_log, "SEGMENT_BYTES_MAX", 300)
    write(log, [operation(seq) for seq in range(1, 8)])
    segment(tmp_path, 3).write_bytes(segment(tmp_path, 2).read_bytes())
    with pytest.raises(Corruption):
        list(log.read())


def test_tail_torn_at_every_byte_loses_only_the_torn_operation(log, tmp_path):
    kept = write(log, [operation(1), operation(2)])
    write(log, [operation(3, text="u" * 700, count=2)], kept)
    whole = segment(tmp_path).read_bytes()
    for size in range(kept.end_offset, len(whole)):
        segment(tmp_path).write_bytes(whole[:size])
        assert [op.first_seq for op, _ in log.read()] == [1, 2]
        assert os.path.getsize(segment(tmp_path)) == size, "reading never writes"
        assert list(log.recover(kept)) == []
        assert segment(tmp_path).read_bytes() == whole[: kept.end_offset]
        again = log.append(operation(3), kept)
        assert [op.first_seq for op, _ in log.read()] == [1, 2, 3] and log.holds(again)


def test_tail_with_unwritten_sectors_is_torn(log, tmp_path):
    kept = write(log, [operation(1)])
    write(log, [operation(2, text="u" * 3000)], kept)
    whole = segment(tmp_path).read_bytes()
    for start in range(kept.end_offset // 512 * 512, len(whole), 512):
        low, high = max(start, kept.end_offset), min(start + 512, len(whole))
        torn = whole[:low] + bytes(high - low) + whole[high:]
        segment(tmp_path).write_bytes(torn)
        assert [op.first_seq for op, _ in log.read()] == [1]


def test_any_flipped_bit_is_noticed(log, tmp_path):
    ends = [write(log, [operation(1)])]
    for seq in range(2, 5):
        ends.append(log.append(operation(seq), ends[-1]))
    whole = segment(tmp_path).read_bytes()
    good = [op for op, _ in log.read()]
    last_begins = ends[-1].record_offset
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        segment(tmp_path).write_bytes(damaged)
        if bit // 8 < last_begins:
            with pytest.raises(Corruption) as caught:
                list(log.read())
            assert caught.value.facts["segment"] == "00000001.log"
            assert "offset" in caught.value.facts
        else:
            try:
                assert [op for op, _ in log.read()] == good[:-1]
            except Corruption:
                pass


def test_hostile_segments_raise_typed_errors_only(log, tmp_path):
    import random

    write(log, [operation(1), operation(2)])
    whole = segment(tmp_path).read_bytes()
    chance = random.Random(5)
    for _ in range(1500):
        hostile = bytearray(whole)
        for _ in range(chance.randrange(1, 9)):
            at = chance.randrange(len(hostile))
            hostile[at : at + chance.randrange(5)] = chance.randbytes(chance.randrange(9))
        segment(tmp_path).write_bytes(hostile[: chance.randrange(len(hostile) + 1)])
        try:
            list(log.recover(START))
        except DmError:
            pass


def test_failed_fsync_kills_the_log_and_the_next_process_settles_the_end(
    log, tmp_path, monkeypatch
):
    kept = write(log, [operation(1)])

    def refuse(file):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(event_log.os, "fsync", refuse)
        with pytest.raises(StorageFailed):
            log.append(operation(2), kept)
    with pytest.raises(StorageFailed, match="earlier write"):
        log.append(operation(2), kept)

    synced, written = [], []
    real_fsync, real_pwrite = os.fsync, os.pwrite
    monkeypatch.setattr(event_log.os, "fsync", lambda f: (synced.append(f), real_fsync(f)))
    monkeypatch.setattr(
        event_log.os, "pwrite", lambda f, d, o: (written.append(o), real_pwrite(f, d, o))[1]
    )
    next_process = EventLog(str(tmp_path))
    found = list(next_process.recover(kept))
    assert [op.first_seq for op, _ in found] == [2]
    assert written == [found[0][1].record_offset] and synced, "written anew before it is believed"


CHILD = """
import sys
from dmsync.core import events as ev
from dmsync.storage.catalog import Catalog
home, tag, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
catalog = Catalog.open(home, lambda dot, commit: b"")
for n in range(count):
    with catalog.transaction("test", tag) as tx:
        tx.append(ev.RemoteAdded(f"{tag}-{n}", "ssh://h"))
        tx.append(ev.RemoteObserved(f"{tag}-{n}", b"d" * 16, b"c" * 16, 1, n))
    print(n, flush=True)
"""


def test_acknowledged_operations_survive_sigkill(tmp_path):
    home = tmp_path / "s"
    make_store(home)
    acknowledged = set()
    for attempt in range(14):
        child = start_python(CHILD, str(home), f"t{attempt}", "100000")
        assert child.stdout is not None
        first = child.stdout.readline()
        assert first, child.stderr.read().decode()
        time.sleep(0.004 * attempt)
        child.send_signal(signal.SIGKILL)
        rest = child.stdout.read()
        child.communicate()
        for line in (first + rest).splitlines(keepends=True):
            if line.endswith(b"\n"):
                acknowledged.add(f"t{attempt}-{int(line)}")
        if attempt % 5 == 4:
            drop_catalog(home)
    with open_catalog(home, CommitShelf()) as catalog:
        remotes = {row.name for row in catalog.remotes()}
        assert acknowledged <= remotes and len(remotes) <= len(acknowledged) + 14
        assert len(acknowledged) >= 14
        # An operation is there as a whole or not at all.
        assert all(catalog.observed(name, b"d" * 16) is not None for name in remotes)
        digest = catalog.digest()
    drop_catalog(home)
    with open_catalog(home, CommitShelf()) as catalog:
        assert catalog.digest() == digest


def test_two_processes_lose_and_duplicate_nothing(tmp_path):
    home = tmp_path / "s"
    make_store(home)
    children = [start_python(CHILD, str(home), tag, "60") for tag in ("a", "b")]
    for child in children:
        _, errors = child.communicate(timeout=60)
        assert child.returncode == 0, errors.decode()
    operations = [op for op, _ in EventLog(str(home / "events")).read()]
    seqs = [stored.seq for op in operations for stored in op.stored_events()]
    assert seqs == list(range(1, 1 + 2 * 2 * 60 + 1))
    with open_catalog(home, CommitShelf()) as catalog:
        assert len(catalog.remotes()) == 120


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs needs root")
def test_full_disk_is_reported_and_leaves_a_good_log(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)])
    if mounted.returncode:
        pytest.skip("mount is not allowed here")
    try:
        home = disk / "s"
        make_store(home)
        acknowledged = 0
        with open_catalog(home, CommitShelf()) as catalog:
            with pytest.raises(StorageFull) as caught:
                for n in range(10_000):
                    with catalog.transaction("test", "me") as tx:
                        tx.append(ev.RemoteAdded(f"r{n}", "u" * 3000))
                    acknowledged += 1
        recorded = acknowledged + bool(caught.value.facts.get("recorded"))
        assert acknowledged > 20
        ops = [op for op, _ in EventLog(str(home / "events")).read()]
        assert len(ops) == 1 + recorded
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", ["segment", "segment-v1"])
def test_segment_vector_is_read_and_written_alike(log, tmp_path, name):
    vector = Path(__file__).parents[3] / "protocol" / "vectors" / "events" / f"{name}.txt"
    fields = dict(line.split(": ", 1) for line in vector.read_text().splitlines())
    whole = bytes.fromhex(fields["bytes"])
    segment(tmp_path).write_bytes(whole)
    read = list(log.read())
    assert read[-1][1].last_seq == int(fields["last_seq"])
    assert read[-1][1].chain_hash.hex() == fields["chain_hash"]
    if name == "segment":  # events of older versions are read, not written
        segment(tmp_path).unlink()
        write(log, [op for op, _ in read])
        assert segment(tmp_path).read_bytes() == whole
