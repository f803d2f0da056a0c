"""Shallow clones: all of the history's records, the content of its newest commits."""

import random

import pytest

from tests.support.cluster import Cluster, MakeCluster

COMMITS = 20


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def origin(make_cluster: MakeCluster) -> Cluster:
    """A dot of 20 commits; each replaces a 100 kB file and changes a page of a larger one."""
    cluster = make_cluster("origin")
    cluster.init("app")
    data = bytearray(noise(600_000, 0))
    for number in range(COMMITS):
        data[number * 4096 : number * 4096 + 4096] = noise(4096, number)
        cluster.write("app", {"db": bytes(data), "report": noise(100_000, 100 + number)})
        cluster.commit(f"c{number}")
    return cluster


def content(cluster: Cluster, commits: list[str]) -> list[str]:
    """What a full comparison with the parent tells of each commit, byte counts included."""
    return [cluster.run("ls", f"{commit}:__default__", "-l", "--json").stdout for commit in commits]


def test_a_shallow_clone_over_ssh(make_cluster: MakeCluster, origin: Cluster) -> None:
    full, shallow = make_cluster("full"), make_cluster("shallow")
    for cluster in (full, shallow):
        cluster.add_remote("origin", origin)
    whole = full.run("clone", "origin", "app", "--json").summary()
    part = shallow.run("clone", "origin", "app", "--depth", "2", "--json").summary()
    assert (part["commits_received"], part["commits_hollow"]) == (COMMITS, COMMITS - 2)
    assert part["bytes_received"] < 0.5 * whole["bytes_received"]
    assert shallow.messages() == full.messages()
    assert shallow.files("app").keys() == full.files("app").keys()
    shown = shallow.run("dot", "show", "app", "--json").json()
    assert (shown["commits"], shown["hollow_commits"]) == (COMMITS, COMMITS - 2)
    assert "(18 without content)" in shallow.run("dot", "show", "app").stdout

    commits = [commit["id"] for commit in full.run("log", "--json").json()]
    old = commits[5]
    for command in (
        ["checkout", "-b", "old", old],
        ["reset", "--hard", old],
        ["ls", f"{old}:__default__"],
        ["cat", f"{old}:__default__/report"],
        ["diff", old, "HEAD"],
    ):
        before = shallow.files("app")
        shallow.refused(*command, code=10, saying="--deepen")
        assert shallow.files("app") == before
        assert shallow.branches() == ["master"]
    shown = shallow.run("show", old)
    assert "c5" in shown.stdout and "not here" in shown.stderr
    assert "not here" in shallow.run("log", "--stat", "--oneline").stdout
    assert "report" in shallow.run("show", "HEAD").stdout

    deeper = shallow.run("fetch", "origin", "app", "--deepen", "3", "--json").summary()
    assert deeper["commits_deepened"] == 3
    assert content(shallow, commits[-5:]) == content(full, commits[-5:])
    shallow.refused("ls", f"{commits[-6]}:__default__", code=10)
    said = shallow.run("fetch", "origin", "app", "--unshallow").stdout
    assert "15 commits have their content now" in said
    assert content(shallow, commits) == content(full, commits)
    for cluster in (full, shallow):
        checked = cluster.run("fsck", "--full", "--json").summary()
        assert (checked["problems"], checked["hollow_commits"]) == ([], 0)
    again = shallow.run("fetch", "origin", "app", "--unshallow", "--json").summary()
    assert again["nothing_to_do"] and again["round_trips"] == 1


def test_a_shallow_clone_pushes_to_its_origin_to_an_empty_store_and_back(
    make_cluster: MakeCluster, origin: Cluster
) -> None:
    shallow, empty, full = make_cluster("shallow"), make_cluster("empty"), make_cluster("full")
    for cluster in (shallow, full):
        cluster.add_remote("origin", origin)
        cluster.add_remote("empty", empty)
    full.run("clone", "origin", "app")
    shallow.run("clone", "origin", "app", "--depth", "2")
    shallow.write("app", {"mine": "from the shallow clone"})
    new = shallow.commit("mine")
    assert shallow.run("push", "origin", "app", "--json").summary()["commits_hollow"] == 0
    assert origin.run("cat", f"{new}:__default__/mine").stdout == "from the shallow clone"

    pushed = shallow.run("push", "empty", "app", "--json").summary()
    assert (pushed["commits_sent"], pushed["commits_hollow"]) == (COMMITS + 1, COMMITS - 2)
    empty.run("checkout", "master", "--dot", "admin/app", check=False)
    checked = empty.run("fsck", "--full", "--json").summary()
    assert (checked["problems"], checked["hollow_commits"]) == ([], COMMITS - 2)

    # a full clone takes the commit from there and stays complete; then fills the store up
    full.run("pull", "empty", "app")
    assert full.files("app")["mine"] == "from the shallow clone"
    assert full.run("fsck", "--full", "--json").summary()["hollow_commits"] == 0

    # going on as ever: a branch, a merge of lines that part below the boundary, a pull
    shallow.run("checkout", "-b", "side")
    shallow.write("app", {"side": "1"})
    shallow.commit("on side")
    shallow.run("push", "origin", "app", "side")
    full.run("pull", "origin", "app", "--all")
    assert full.messages("side")[-1] == "on side"
    full.write("app", {"full": "2"})
    full.commit("from full")
    full.run("push", "origin", "app")
    shallow.run("checkout", "master")
    shallow.run("pull", "origin", "app")
    assert shallow.files("app")["full"] == "2"
    assert shallow.run("fsck", "--full", "--json").summary()["problems"] == []


def test_a_deepening_that_is_killed_goes_on_where_it_stopped(
    make_cluster: MakeCluster, origin: Cluster
) -> None:
    shallow = make_cluster("shallow")
    shallow.add_remote("origin", origin)
    shallow.run("clone", "origin", "app", "--depth", "1")
    received = shallow.home / "dots"
    running = shallow.start("fetch", "origin", "app", "--unshallow")
    while running.process.poll() is None:
        if sum(part.stat().st_size for part in received.glob("*/quarantine/*.part")) > 300_000:
            running.kill()
            break
    summary = shallow.run("fetch", "origin", "app", "--unshallow", "--json").summary()
    checked = shallow.run("fsck", "--full", "--json").summary()
    assert (checked["problems"], checked["hollow_commits"]) == ([], 0)
    assert summary["commits_unavailable"] == 0


def test_only_one_way_to_say_how_much(make_cluster: MakeCluster) -> None:
    cluster = make_cluster("one")
    cluster.init("app")
    cluster.refused("fetch", "x", "app", "--deepen", "2", "--unshallow", code=2)
    cluster.refused("clone", "x", "app", "--depth", "0", code=2)
