"""gc with real processes: killed anywhere, beside a push, beside itself, on a full disk."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, MakeCluster
from tests.support.processes import wait_until

KILLED_SCRIPT = Path(__file__).parents[1] / "support" / "killed_command.py"
KILLS = 7
DATABASE = 300_000


def grow(cluster: Cluster, dot: str, commits: int = 5) -> None:
    """Commits of a file in which a little changes each time."""
    content = bytearray(os.urandom(DATABASE))
    for number in range(commits):
        at = number * 8192
        content[at : at + 4096] = os.urandom(4096)
        cluster.write(dot, {"database": bytes(content)})
        cluster.commit(f"c{number}")


def lose_branch(cluster: Cluster, dot: str) -> dict[str, str | bytes]:
    """A branch with content of its own that is deleted; returns that content."""
    lost: dict[str, str | bytes] = {"lost/a": os.urandom(200_000), "lost/b": "small"}
    cluster.run("checkout", "-b", "side")
    cluster.write(dot, lost)
    cluster.commit("lost")
    cluster.run("checkout", "master")
    cluster.run("branch", "-d", "side")
    return lost


def is_sound(cluster: Cluster) -> None:
    cluster.run("fsck", "--full")


def test_killed_anywhere_the_same_data_can_be_committed_and_restored(
    make_cluster: MakeCluster, tmp_path: Path
) -> None:
    """What a killed gc left must not make a commit believe that something is stored."""
    cluster = make_cluster("killed")
    cluster.init("app")
    grow(cluster, "app")
    lost = lose_branch(cluster, "app")
    cluster.run("prune", "--keep-last", "2")
    pristine = tmp_path / "pristine"
    shutil.copytree(cluster.home, pristine, symlinks=True)
    total = _run_killed(cluster, 0, tmp_path)
    assert total > KILLS
    for kill in range(KILLS):
        shutil.rmtree(cluster.home)
        shutil.copytree(pristine, cluster.home, symlinks=True)
        _run_killed(cluster, 1 + kill * (total - 1) // (KILLS - 1), tmp_path)
        is_sound(cluster)
        before = cluster.files("app")
        cluster.write("app", lost)
        made = cluster.commit("the same again")
        out = tmp_path / f"out{kill}"
        cluster.run("export", f"{made}:__default__", out)
        for name, content in lost.items():
            expected = content.encode() if isinstance(content, str) else content
            assert (out / name).read_bytes() == expected
        assert (out / "database").stat().st_size and before.keys() <= cluster.files("app").keys()
        cluster.run("gc", "--grace", "0")
        is_sound(cluster)


def _run_killed(cluster: Cluster, at: int, scratch: Path) -> int:
    """Run gc, killed before its change number `at`; how many changes there were if it was not."""
    report = scratch / "changes"
    report.unlink(missing_ok=True)
    done = subprocess.run(
        [sys.executable, KILLED_SCRIPT, str(at), "gc", "--grace", "0"],
        env={**cluster.environment, "KILL_COUNT_FILE": str(report)},
        capture_output=True,
        timeout=60,
    )
    assert done.returncode in (0, -9), done.stderr
    return int(report.read_text()) if report.exists() else 0


def test_a_push_under_way_keeps_its_dot_and_gc_says_who(make_cluster: MakeCluster) -> None:
    here, there = make_cluster("here"), make_cluster("there")
    here.init("app", {"first": "x"})
    here.commit("first")
    here.add_remote("origin", there)
    here.run("push", "origin")
    grow(here, "app", 2)
    here.write("app", {"large": os.urandom(600_000)})
    here.commit("large")
    push = subprocess.Popen(
        [*here.program, "push", "origin", "--limit-rate", "250k"], env=here.environment
    )
    hold = next(there.home.glob("dots/*")) / "quarantine"
    wait_until(lambda: list(hold.glob("*.part")), what="the push to begin")
    busy = there.run("gc", "--grace", "0", "--lock-wait", "0.2", "--json", check=False)
    assert busy.code == 3, busy.describe()
    assert "serve" in str(busy.summary()["dots"][0]["held_by"])
    assert there.run("log", "app", check=False).code in (0, 10)  # a query does not wait
    assert push.wait(60) == 0
    there.run("gc", "--grace", "0", "--lock-wait", "20")
    is_sound(there)
    assert there.tip(dot="app") == here.tip()


def test_a_server_with_warm_caches_takes_again_what_gc_has_removed(
    make_cluster: MakeCluster,
) -> None:
    here, there = make_cluster("here"), make_cluster("there")
    here.init("app")
    grow(here, "app", 2)
    here.add_remote("origin", there)
    here.run("push", "origin")
    here.run("checkout", "-b", "side")
    here.write("app", {"more": os.urandom(300_000)})
    here.commit("more")
    here.run("push", "origin", "app", "side")
    there.run("branch", "-d", "side", "--dot", "app")
    there.run("gc", "--grace", "0", "--lock-wait", "20")
    with (here.tree("app@side") / "more").open("r+b") as file:
        file.seek(8192)
        file.write(os.urandom(4096))
    here.commit("a change of it")
    here.run("push", "origin", "app", "side")  # the change is stored here as a delta
    is_sound(there)
    assert there.tip("side", dot="app") == here.tip("side")


def test_two_at_once(cluster: Cluster) -> None:
    cluster.init("app")
    grow(cluster, "app")
    lose_branch(cluster, "app")
    both = [
        subprocess.Popen(
            [*cluster.program, "gc", "--grace", "0"],
            env=cluster.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]
    for one in both:
        _, errors = one.communicate(timeout=60)
        assert one.returncode == 0, errors
    is_sound(cluster)


@contextmanager
def small_disk(directory: Path, size_bytes: int) -> Iterator[Path]:
    """A filesystem of so many bytes."""
    directory.mkdir()
    options = f"size={size_bytes},mode=700"
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


def fill(directory: Path) -> Path:
    """Use up every byte there is."""
    path = directory / "filler"
    with path.open("ab", buffering=0) as file:
        for size in (65536, 4096, 512, 1):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                continue
    return path


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize("what", ["pruned", "forgotten", "deleted"])
def test_on_a_full_disk_it_frees_what_it_can(cluster: Cluster, tmp_path: Path, what: str) -> None:
    with small_disk(tmp_path / "disk", 6 << 20) as disk:
        cluster.home = disk / "store"
        cluster.environment["DM_HOME"] = str(cluster.home)
        data = tmp_path / "data"
        data.mkdir()
        cluster.run("init", "app", "--at", str(data))
        for number in range(6):
            (data / "file").write_bytes(os.urandom(250_000))
            cluster.commit(f"c{number}")
        if what == "pruned":
            cluster.run("prune", "--keep-last", "1")
        elif what == "forgotten":
            cluster.run("reset", "--hard", "HEAD~5")
        else:
            cluster.run("init", "other")
            cluster.run("dot", "delete", "-f", "app")
        tip = cluster.tip("master") if what != "deleted" else ""
        filler = fill(disk)
        assert os.statvfs(disk).f_bavail == 0
        before = _packs(disk)
        done = cluster.run("gc", "--grace", "0", "--lock-wait", "2", check=False)
        assert done.code == 0, done.describe()
        assert _packs(disk) < before - 1_000_000
        assert os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize > 900_000
        is_sound(cluster)
        if what != "deleted":
            assert cluster.tip("master") == tip
        filler.unlink()
        cluster.run("gc", "--grace", "0")
        is_sound(cluster)


def _packs(disk: Path) -> int:
    return sum(path.stat().st_size for path in disk.glob("store/**/packs/*.pack"))


def test_commands_beside_gc_in_a_loop(cluster: Cluster) -> None:
    """Nothing that a command made can go, however the two meet."""
    cluster.init("app")
    grow(cluster, "app", 2)
    gc = subprocess.Popen(
        ["sh", "-c", 'while :; do "$0" gc --grace 0 --lock-wait 1 -q || :; done', *cluster.program],
        env=cluster.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        end = time.monotonic() + 8
        made: list[str] = []
        while time.monotonic() < end or len(made) < 4:
            cluster.write("app", {"file": os.urandom(30_000)})
            made.append(cluster.commit("beside"))
            cluster.run("branch", f"b{len(made)}")
            if len(made) % 3 == 0:
                cluster.run("reset", "--hard", "HEAD~1")
    finally:
        os.killpg(gc.pid, 9)
        gc.wait()
    is_sound(cluster)
    for number, commit in enumerate(made, 1):
        assert cluster.tip(f"b{number}") == commit
