"""Moving work with the real `dm`: restore, export, stash, amend, carry, cherry-pick, revert."""

import json
import os
import signal
import subprocess
import tarfile
import time
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, MakeCluster
from tests.support.tree import describe_tree


@pytest.fixture
def apples(cluster: Cluster) -> Cluster:
    """A managed dot with two commits on master, one more on side, and two subdots."""
    cluster.init("apples", {"stock.txt": "one\n", "reports/may": "may\n"})
    cluster.write("apples.database", {"rows": "one\n"})
    cluster.commit("first", "-d", "season=spring")
    cluster.run("checkout", "-b", "side")
    cluster.write("apples", {"stock.txt": "side\n", "side": "side\n"})
    cluster.commit("on the side", "-d", "ticket=7")
    cluster.run("checkout", "master")
    cluster.write("apples", {"reports/may": "May\n"})
    cluster.commit("second")
    return cluster


def test_restore_brings_single_paths_back(apples: Cluster) -> None:
    apples.write("apples", {"stock.txt": "wrong\n", "reports/june": "june\n"})
    apples.write("apples.database", {"rows": "wrong\n"})
    told = apples.run(
        "restore", "-n", "HEAD~1", "--", "__default__/reports", "database", "--delete", check=False
    )
    assert told.code == 10  # behind `--` everything is a path
    told = apples.run(
        "restore", "-n", "--delete", "HEAD~1", "--", "__default__/reports", "database/"
    )
    assert told.stdout == (
        "- __default__/reports/june\n* __default__/reports/may\n* database/rows\n"
    )
    apples.refused("restore", "HEAD~1", "--", "__default__/reports", code=18, saying="reports/june")
    done = apples.run(
        "restore", "--delete", "--json", "HEAD~1", "--", "__default__/reports", "database"
    ).summary()
    assert done["stash"].startswith("stash/restore-") and len(done["changes"]) == 3
    assert apples.files("apples") == {"stock.txt": "wrong\n", "reports/may": "may\n"}
    assert apples.files("apples.database") == {"rows": "one\n"}
    apples.run("restore", "__default__/stock.txt")
    assert apples.files("apples")["stock.txt"] == "one\n"
    assert apples.messages() == ["first", "second"]
    listed = apples.run("stash", "list", "--json").json()
    assert [stash["branch"] for stash in listed] == ["master", "master"]
    apples.run("stash", "push")
    apples.run("stash", "apply", done["stash"])
    assert apples.files("apples")["reports/june"] == "june\n"


def test_bad_restores_change_nothing(apples: Cluster) -> None:
    before = describe_tree(apples.tree("apples.__root__"))
    apples.refused("restore", code=2)
    apples.refused("restore", "HEAD", "--", code=2, saying="dm restore REV -- PATH")
    apples.refused("restore", "HEAD", "x", "--", "y", code=2, saying="one revision")
    apples.refused("restore", "HEAD~1", "__default__/stock.txt", code=10, saying="no path HEAD~1")
    apples.refused("restore", "nowhere", "--", "__default__", code=10)
    apples.refused("restore", "--", "../../etc/passwd", code=2, saying="no path in a dot")
    refused = apples.refused(
        "restore", "--json", "--", b"\x1b[31m\xff".decode("utf-8", "surrogateescape"), code=10
    )
    assert "\x1b" not in refused.stderr
    assert describe_tree(apples.tree("apples.__root__")) == before
    assert apples.run("stash", "list").stdout == ""


def test_exports_equal_the_tree(apples: Cluster, tmp_path: Path) -> None:
    tree = apples.tree("apples.__root__")
    os.link(tree / "__default__" / "stock.txt", tree / "__default__" / "linked")
    os.setxattr(tree / "database" / "rows", "user.x", b"\0\xff")
    apples.commit("third")
    expected = describe_tree(tree)
    apples.run("export", "HEAD", tmp_path / "out")
    assert describe_tree(tmp_path / "out") == expected
    for name, option in (("out.tar", "-p"), ("out.tar.gz", "-z"), ("out.tar.zst", "--zstd")):
        told = apples.run("export", "HEAD", tmp_path / name, "--json").summary()
        assert told["files"] == 4
        into = tmp_path / f"from-{name}"
        into.mkdir()
        subprocess.run(
            [
                "tar",
                "--xattrs",
                "--xattrs-include=*",
                "-p",
                option,
                "-xf",
                tmp_path / name,
                "-C",
                into,
            ],
            check=True,
        )
        assert describe_tree(into) == expected
    apples.refused("export", "HEAD", tmp_path / "out", code=1, saying="not empty")
    apples.refused("export", "HEAD", tmp_path / "out.tar", code=1, saying="exists")
    apples.refused("export", "HEAD", tmp_path / "out", "--force", code=2, saying="confirmation")
    (tmp_path / "out" / "mine").write_text("mine")
    apples.run("export", "HEAD", tmp_path / "out", "--force", "--yes")
    assert describe_tree(tmp_path / "out") == expected
    apples.refused("export", "HEAD", apples.home / "x.tar", code=18)
    apples.refused("export", "HEAD:__default__/nothing", tmp_path / "y.tar", code=10)
    assert not (tmp_path / "y.tar").exists()


def test_an_archive_streams_to_standard_output(apples: Cluster, tmp_path: Path) -> None:
    with open(tmp_path / "out.tar", "wb") as file:
        subprocess.run(
            [*apples.program, "export", "side:__default__", "-", "--json"],
            env=apples.environment, stdout=file, check=True,
        )  # fmt: skip
    with tarfile.open(tmp_path / "out.tar") as archive:
        names = sorted(archive.getnames())
        assert archive.extractfile("side").read() == b"side\n"  # type: ignore[union-attr]
    assert names == [".", "reports", "reports/may", "side", "stock.txt"]
    listed = subprocess.run(
        f"{apples.program[0]} export HEAD - | head -c 100 | wc -c",
        shell=True, env=apples.environment, capture_output=True,
    )  # fmt: skip
    assert listed.stdout.strip() == b"100" and b"Traceback" not in listed.stderr


@pytest.mark.parametrize("name", ["out", "out.tar", "out.tar.gz"])
def test_a_killed_export_leaves_nothing_under_its_name(
    cluster: Cluster, tmp_path: Path, name: str
) -> None:
    cluster.init("big")
    tree = cluster.tree("big")
    for number in range(40):
        (tree / f"file-{number}").write_bytes(os.urandom(1024 * 1024))
    cluster.commit("big")
    daemon = subprocess.Popen(
        [*cluster.program, "export", "HEAD", tmp_path / name],
        env=cluster.environment, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    # A directory is made beside its place, an archive under its own name and more.
    beginnings = (".dm-tmp-", f"{name}.tmp-")
    while not any(entry.startswith(beginnings) for entry in os.listdir(tmp_path)):
        assert daemon.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    daemon.send_signal(signal.SIGKILL)
    assert daemon.wait() == -signal.SIGKILL
    assert not (tmp_path / name).exists()
    cluster.run("export", "HEAD", tmp_path / name)


def test_stash_push_pop_and_list(apples: Cluster) -> None:
    assert apples.run("stash").stderr.strip() == "no local changes"
    apples.refused("stash", "push", "--fail-if-nothing", code=4)
    apples.write("apples", {"stock.txt": "uncommitted\n"})
    name = apples.run("stash", "-m", "half\x1b done").stdout.strip()
    assert name.startswith("stash/master-")
    assert apples.files("apples")["stock.txt"] == "one\n"
    line = apples.run("stash", "list").stdout
    assert line.startswith(f"stash@{{0}} {name} master ") and "half\\x1b done" in line
    assert apples.run("stash", "show").stdout == "* __default__/stock.txt\n"
    assert apples.run("diff", "HEAD", name).stdout == "* __default__/stock.txt\n"
    apples.write("apples", {"reports/may": "dirty\n"})
    apples.refused("stash", "pop", code=18, saying="uncommitted")
    apples.commit("third")
    popped = apples.run("stash", "pop", "--json").summary()
    assert popped["dropped"] and popped["name"] == name and popped["conflicts"] == []
    assert apples.files("apples")["stock.txt"] == "uncommitted\n"
    assert apples.files("apples")["reports/may"] == "dirty\n"
    assert apples.run("stash", "list").stdout == ""


def test_bad_stash_commands(apples: Cluster) -> None:
    apples.refused("stash", "pop", code=10, saying="no stashes")
    apples.refused("stash", "-m", "", code=2)
    apples.refused("stash", "-m", "x", "list", code=2)
    apples.refused("stash", "nothing", code=2)
    apples.refused("stash", "drop", code=2)
    apples.write("apples", {"stock.txt": "uncommitted\n"})
    apples.run("stash")
    apples.refused("stash", "drop", "7", code=10)
    apples.refused("stash", "branch", "a/b", code=2)
    apples.refused("stash", "branch", "side", code=1)
    assert len(apples.run("stash", "list", "--json").json()) == 1
    apples.run("stash", "branch", "work", "0")
    assert apples.files("apples")["stock.txt"] == "uncommitted\n"
    assert apples.run("status", "--json").json()["branch"] == "work"


def test_a_stash_that_conflicts_goes_on_like_a_merge(apples: Cluster) -> None:
    apples.write("apples", {"stock.txt": "uncommitted\n"})
    name = apples.run("stash").stdout.strip()
    apples.write("apples", {"stock.txt": "committed\n"})
    apples.commit("third")
    refused = apples.refused("stash", "pop", code=15, saying=f"{name} is kept")
    assert "C __default__/stock.txt" in refused.stdout
    apples.run("restore", "__default__/reports/may")  # works in the middle of it
    apples.run("merge", "--abort")
    assert apples.files("apples")["stock.txt"] == "committed\n"
    assert apples.run("stash", "list", "--json").json()[-1]["name"] == name


def test_amend(apples: Cluster, make_cluster: MakeCluster) -> None:
    before = apples.tip()
    apples.write("apples", {"stock.txt": "two\n"})
    amended = apples.run("commit", "--amend").stdout.strip()
    assert amended != before and apples.messages() == ["first", "second"]
    apples.run("commit", "--amend", "-m", "better words", "-d", "k=v")
    (last,) = apples.run("log", "-n", "1", "--json").json()
    assert (last["message"], last["metadata"]) == ("better words", {"k": "v"})
    apples.add_remote("vault", make_cluster("vault"))
    apples.run("push", "vault")
    pushed = apples.tip()
    apples.refused("commit", "--amend", "-m", "x", code=18, saying="--amend-pushed")
    assert apples.tip() == pushed
    apples.run("commit", "--amend-pushed", "-m", "x")
    assert apples.messages() == ["first", "x"]


def test_carry(apples: Cluster) -> None:
    apples.write("apples", {"new": "new\n"})
    apples.run("checkout", "-b", "feature", "--carry")
    assert apples.files("apples@feature")["new"] == "new\n"
    assert "new" not in apples.files("apples@master")
    apples.run("checkout", "side", "--carry")
    assert apples.files("apples@side")["new"] == "new\n"
    apples.write("apples", {"reports/may": "mine\n"})
    apples.refused("checkout", "master", "--carry", code=15, saying="reports/may")
    assert apples.files("apples@side")["reports/may"] == "mine\n"
    apples.refused("checkout", "master", "--carry", "--discard", code=2)


def test_cherry_pick_and_revert(apples: Cluster) -> None:
    picked = apples.run("cherry-pick", "-x", "side").stdout.strip()
    assert picked == apples.tip()
    (last,) = apples.run("log", "-n", "1", "--json").json()
    assert last["message"].startswith("on the side\n\n(cherry picked from commit ")
    assert last["metadata"] == {"ticket": "7"}
    assert apples.files("apples")["stock.txt"] == "side\n"
    assert "nothing left" in apples.run("cherry-pick", "side").stderr
    assert apples.tip() == picked
    apples.run("revert", "HEAD")
    assert apples.files("apples")["stock.txt"] == "one\n" and "side" not in apples.files("apples")
    assert apples.messages()[-1].startswith('revert "on the side"')
    apples.write("apples", {"stock.txt": "three\n"})
    apples.commit("third")
    stopped = apples.refused(
        "cherry-pick", "side", "side~1", code=15, saying="; then dm cherry-pick"
    )
    assert "C __default__/stock.txt" in stopped.stdout
    apples.refused("revert", "HEAD", code=15, saying="under way")
    apples.run("merge", "--abort")
    assert apples.files("apples")["stock.txt"] == "three\n"


def test_bad_picks_change_nothing(apples: Cluster) -> None:
    tip = apples.tip()
    apples.refused("cherry-pick", code=2)
    apples.refused("cherry-pick", "nowhere", code=10)
    apples.refused("cherry-pick", "-m", "2", "side", code=2, saying="no parent 2")
    apples.refused("cherry-pick", "-m", "x", "side", code=2)
    apples.refused("revert", "HEAD~1", code=2, saying="first commit")
    apples.refused("cherry-pick", "--no-commit", "side", "side", code=2)
    apples.write("apples", {"x": "x"})
    apples.refused("revert", "HEAD", code=18)
    told = json.loads(
        apples.run("cherry-pick", "side", "--json", check=False).stderr.splitlines()[-1]
    )
    assert told["code"] == "would-lose"
    assert apples.tip() == tip


@pytest.mark.parametrize("command", [("stash", "pop"), ("restore", "HEAD~1", "--", "__default__")])
def test_a_killed_switch_is_finished_by_the_next_command(
    cluster: Cluster, command: tuple[str, ...]
) -> None:
    cluster.init("big")
    tree = cluster.tree("big")
    names = [f"file-{number:03}" for number in range(200)]

    def fill(letter: bytes) -> None:
        for name in names:
            (tree / name).write_bytes(letter * 100_000)

    fill(b"a")
    if command[0] == "stash":
        cluster.commit("first")
        fill(b"b")
        wanted = describe_tree(tree)
        cluster.run("stash")
    else:
        wanted = describe_tree(tree)
        cluster.commit("first")
        fill(b"b")
        cluster.commit("second")
    before = (tree / names[0]).read_bytes()[:1]
    with subprocess.Popen(
        [*cluster.program, *command], env=cluster.environment, stderr=subprocess.DEVNULL
    ) as daemon:
        while daemon.poll() is None and (tree / names[0]).read_bytes()[:1] == before:
            time.sleep(0.001)
        daemon.kill()
    assert (tree / names[0]).read_bytes()[:1] != before
    cluster.commit("after the kill")
    assert describe_tree(tree) == wanted
    cluster.run("fsck", "--full")
