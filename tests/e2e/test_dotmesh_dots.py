"""Dotmesh's acceptance scenarios about one cluster's dots, under Dotmesh's names.

What each showed there: protocol/README.md names the list; where content ids or git's ways make a
scenario senseless the test says what happens instead.
"""

import random
import subprocess
from pathlib import Path

import pytest

from tests.support.cluster import Cluster
from tests.support.tree import describe_tree

KILL_ROUNDS = 8


def test_default_dot_switch(cluster: Cluster) -> None:
    """With exactly one dot, commands work without `dm switch`, whoever made it."""
    cluster.init("apples", {"HELLO": "world"})
    id_ = cluster.commit("hello")
    assert id_ in cluster.run("log").stdout
    assert cluster.messages() == ["hello"]


def test_no_default_dot_error(pair: tuple[Cluster, Cluster]) -> None:
    """Two dots and none chosen (both came by push): commands that need one say so."""
    near, far = pair
    for name in ("apples", "pears"):
        near.init(name, {"HELLO": name})
        near.commit("hello")
        near.run("push", "far", name)
    for command in (["log"], ["commit", "-m", "x"], ["status"], ["branch"]):
        far.refused(*command, code=10, saying="No current dot is selected")
    far.run("switch", "pears")
    assert far.messages() == ["hello"]


def test_init(cluster: Cluster) -> None:
    cluster.run("init", "apples")
    assert cluster.dots() == ["apples"]
    assert "apples" in cluster.run("list").stdout


def test_init_duplicate(cluster: Cluster) -> None:
    cluster.run("init", "apples")
    refused = cluster.refused("init", "apples", code=1, saying="apples exists already")
    assert refused.stdout == ""
    assert cluster.dots() == ["apples"]


def test_init_crash_safety(cluster: Cluster) -> None:
    """`dm init` killed at random moments leaves no dot or a whole one, and can be run again."""
    moments = random.Random(1)
    for attempt in range(KILL_ROUNDS):
        name = f"apples{attempt}"
        kill_at_random_moment(cluster, moments, "init", name)
        if name not in cluster.dots():
            cluster.run("init", name)
        cluster.run("switch", name)
        cluster.write(name, {"HELLO": "world"})
        cluster.commit("after the crash")
        assert cluster.messages() == ["after the crash"]
    assert cluster.dots() == [f"apples{attempt}" for attempt in range(KILL_ROUNDS)]
    cluster.run("fsck", "--full")


def kill_at_random_moment(cluster: Cluster, moments: random.Random, *command: str) -> None:
    """SIGKILL a command some time before it would usually be done."""
    with cluster.start(*command) as running:
        try:
            running.process.wait(timeout=moments.uniform(0.02, 0.3))
        except subprocess.TimeoutExpired:
            pass  # still running: that is the point


def test_version(pair: tuple[Cluster, Cluster]) -> None:
    """Client and server versions, in Dotmesh's form but for its line on the current remote."""
    near, _ = pair
    words = near.run("version", "far").stdout.split()
    assert words[0:2] == ["Client:", "Version:"]
    assert words[3:5] == ["Server:", "Version:"]
    assert words[2] == words[5]
    assert words[2][0].isdigit()


def test_commit(cluster: Cluster) -> None:
    cluster.init("apples", {"HELLO": "world"})
    id_ = cluster.commit("this is a message")
    log = cluster.run("log").stdout
    assert "    this is a message\n" in log
    assert log.startswith(f"commit {id_}\n")
    assert "Author: " in log


def test_commit_id_override(cluster: Cluster) -> None:
    """Dotmesh let anybody choose a commit's id; here ids are content: the key is refused."""
    cluster.init("apples", {"HELLO": "world"})
    cluster.refused("commit", "-m", "x", "-d", "#commit-id=WEIRDCOMMIT", code=2)
    assert cluster.messages() == []


def test_commit_metadata(cluster: Cluster) -> None:
    """Values keep second equals signs and commas, which Dotmesh cut at."""
    cluster.init("apples", {"HELLO": "world"})
    cluster.commit("x", "-d", "apples=green", "-d", "empty=", "--metadata", "url=a=b,c")
    log = cluster.run("log").stdout.splitlines()
    assert "apples: green" in log
    assert "empty: " in log
    assert "url: a=b,c" in log


def test_commit_metadata_uppercase_failure(cluster: Cluster) -> None:
    cluster.init("apples", {"HELLO": "world"})
    cluster.refused(
        *("commit", "-m", "x", "-d", "Apples=green"),
        code=2,
        saying="Metadata field names must start with lowercase characters: Apples",
    )
    assert cluster.messages() == []


def test_commit_metadata_no_equals_failure(cluster: Cluster) -> None:
    cluster.init("apples", {"HELLO": "world"})
    cluster.refused(
        *("commit", "-m", "x", "-d", "apples"),
        code=2,
        saying="Each metadata value must be a name=value pair: apples",
    )
    assert cluster.messages() == []


def test_massive_metadata(cluster: Cluster) -> None:
    """Dotmesh once kept metadata in properties of 1,024 bytes."""
    value = "x" * 2000
    cluster.init("apples", {"HELLO": "world"})
    cluster.commit("massive", "-d", f"massive={value}")
    assert f"massive: {value}\n" in cluster.run("log").stdout


def test_branch(cluster: Cluster) -> None:
    cluster.init("apples", {"X": "on master"})
    cluster.commit("x on master")
    cluster.run("checkout", "-b", "branch1")
    assert cluster.branches() == ["branch1", "master"]
    cluster.write("apples", {"Y": "on the branch"})
    cluster.commit("y on branch1")
    cluster.run("checkout", "master")
    assert cluster.files("apples") == {"X": "on master"}
    cluster.run("checkout", "branch1")
    assert cluster.files("apples") == {"X": "on master", "Y": "on the branch"}
    assert cluster.messages() == ["x on master", "y on branch1"]


def test_branch_pinning(cluster: Cluster) -> None:
    """`dot@branch` reaches every branch's own tree at once (Dotmesh: for mounts)."""
    cluster.init("apples", {"original": "file"})
    cluster.commit("original")
    for name in ("branch1", "branch2", "branch3"):
        cluster.run("checkout", "master")
        cluster.run("checkout", "-b", name)
        cluster.write("apples", {name: name})
        cluster.commit(name)
    for name in ("branch1", "branch2", "branch3"):
        assert cluster.files(f"apples@{name}") == {"original": "file", name: name}


def test_dot_show(cluster: Cluster) -> None:
    cluster.init("apples", {"X": "x"})
    cluster.commit("x")
    cluster.run("checkout", "-b", "branch1")
    shown = cluster.run("dot", "show").stdout
    assert "apples" in shown.splitlines()[0]
    assert "Dot is currently selected." in shown
    assert "master" in shown
    assert "* branch1" in shown
    fields = [line.split("\t") for line in cluster.run("dot", "show", "-H").stdout.splitlines()]
    assert ["name", "apples"] in fields
    assert ["currentBranch", "branch1"] in fields
    assert ["commitCount", "1"] in fields
    assert {line[2] for line in fields if line[0] == "branch"} >= {"branch1"}


def test_reset_drops_the_commit_from_the_log_and_its_file(cluster: Cluster) -> None:
    """Dotmesh's Reset, and what Dotmesh could not: the reset is undone."""
    cluster.init("apples", {"HELLO": "one"})
    first = cluster.commit("first")
    cluster.write("apples", {"WORLD": "two", "HELLO": "changed"})
    second = cluster.commit("second")
    before = describe_tree(cluster.tree("apples"))
    cluster.run("reset", "--hard", "HEAD^")
    assert cluster.messages() == ["first"]
    assert cluster.tip() == first
    assert cluster.files("apples") == {"HELLO": "one"}
    cluster.run("reset", "--hard", second)
    assert describe_tree(cluster.tree("apples")) == before


def test_reset_without_hard_keeps_uncommitted_changes(cluster: Cluster) -> None:
    cluster.init("apples", {"HELLO": "one"})
    cluster.commit("first")
    cluster.write("apples", {"HELLO": "two"})
    cluster.commit("second")
    cluster.write("apples", {"HELLO": "not committed"})
    cluster.refused("reset", "HEAD^", code=18)
    assert cluster.files("apples") == {"HELLO": "not committed"}
    assert cluster.messages() == ["first", "second"]


def test_reset_refuses_revisions_that_are_not_there(cluster: Cluster) -> None:
    cluster.init("apples", {"HELLO": "one"})
    cluster.commit("first")
    cluster.refused("reset", "--hard", "HEAD^^^", code=10)
    cluster.refused("reset", "--hard", "nonsense", code=10)
    assert cluster.messages() == ["first"]


def test_subdots(cluster: Cluster) -> None:
    """A subdot is a directory of the dot's root; commits and branches take all of them together."""
    cluster.run("init", "apples")
    for subdot in ("frogs", "eat", "flies"):
        cluster.write(f"apples.{subdot}", {"name": subdot})
    cluster.commit("three subdots")
    cluster.run("checkout", "-b", "other")
    cluster.write("apples.frogs", {"name": "changed"})
    cluster.commit("changed on the branch")
    cluster.run("checkout", "master")
    whole = cluster.files("apples.__root__")
    expected = {f"{subdot}/name": subdot for subdot in ("frogs", "eat", "flies")}
    assert {name: text for name, text in whole.items() if name in expected} == expected


def test_default_subdot(cluster: Cluster) -> None:
    cluster.init("apples", {"HELLO": "world"})
    root = cluster.tree("apples.__root__")
    assert (root / "__default__" / "HELLO").read_text() == "world"
    assert cluster.tree("apples") == root / "__default__"


def test_attached_directory_is_the_default_subdot(cluster: Cluster, tmp_path: Path) -> None:
    """Where Dotmesh mounted, `--at` takes a directory as it is."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "HELLO").write_text("world")
    cluster.run("init", "apples", "--at", data)
    cluster.commit("attached")
    assert cluster.tree("apples") == data
    assert cluster.run("cat", "HEAD:__default__/HELLO").stdout == "world"


def test_delete_nonexistant(cluster: Cluster) -> None:
    cluster.run("init", "pears")
    cluster.refused("dot", "delete", "-f", "apples", code=10)
    assert cluster.dots() == ["pears"]


def test_delete_without_force_and_terminal_is_refused(cluster: Cluster) -> None:
    cluster.run("init", "apples")
    assert cluster.run("dot", "delete", "apples", check=False).code != 0
    assert cluster.dots() == ["apples"]


def test_delete_instantly(cluster: Cluster) -> None:
    """Gone from the list at once, and the name free for an empty dot."""
    cluster.init("apples", {"HELLO": "old"})
    cluster.commit("old")
    cluster.run("dot", "delete", "-f", "apples")
    assert cluster.dots() == []
    cluster.run("init", "apples")
    assert cluster.files("apples") == {}
    assert cluster.messages() == []
    assert cluster.dots() == ["apples"]


def test_delete_partial_failure(cluster: Cluster) -> None:
    """Killed in the middle of a deletion: the dot is whole or gone, and a second try ends it."""
    moments = random.Random(2)
    for _ in range(KILL_ROUNDS):
        cluster.init("apples", {f"f{number}": "x" * 1000 for number in range(50)})
        cluster.commit("to be deleted")
        kill_at_random_moment(cluster, moments, "dot", "delete", "-f", "apples")
        if "apples" in cluster.dots():
            assert cluster.messages(dot="apples") == ["to be deleted"]
            cluster.run("dot", "delete", "-f", "apples")
        assert cluster.dots() == []
        cluster.run("fsck", "--full")


def test_delete_branches(cluster: Cluster) -> None:
    """A dot with a tree of branches (master-b1-b2, master-b3) goes in one command."""
    cluster.init("apples", {"HELLO": "master"})
    cluster.commit("on master")
    for base, name in (("master", "b1"), ("b1", "b2"), ("master", "b3")):
        cluster.run("checkout", base)
        cluster.run("checkout", "-b", name)
        cluster.write("apples", {name: name})
        cluster.commit(f"on {name}")
    cluster.run("dot", "delete", "-f", "apples")
    assert cluster.dots() == []
    cluster.run("fsck", "--full")
    cluster.run("init", "apples")
    assert cluster.files("apples") == {}
    assert cluster.branches() == ["master"]


@pytest.mark.parametrize("name", ["@", "a@b@c", "no space", "-dash", "a/b/c", "x" * 65, "", "__x"])
def test_volume_name_validity_checking(pair: tuple[Cluster, Cluster], name: str) -> None:
    """`init`, `clone --local-name`, `pull` and `push --remote-name` refuse the same names."""
    near, far = pair
    near.init("apples", {"HELLO": "world"})
    near.commit("hello")
    near.run("push", "far")
    saying = "invalid dot name" if name == "@" else "invalid"
    for command in (
        ["init", "--", name],
        ["clone", "far", "apples", f"--local-name={name}"],
        ["pull", "far", "--", name],
        ["push", "far", f"--remote-name={name}"],
    ):
        near.refused(*command, code=2, saying=saying)
    assert near.dots() == ["apples"]
    assert far.dots() == ["apples"]
