"""`dm undo`, `redo`, `op`, `reflog` and `--at-op` as they are typed; kills; refusals; a long log."""

import json
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, MakeCluster
from tests.support.processes import wait_until
from tests.support.tree import describe_tree


@pytest.fixture
def here(make_cluster: MakeCluster) -> Cluster:
    return make_cluster("here")


def make_dot(here: Cluster, data: Path) -> None:
    """A dot over `data` with two commits."""
    data.mkdir()
    (data / "a").write_text("one\n")
    here.run("init", "app", "--at", data)
    here.commit("first")
    (data / "a").write_text("two!\n")
    here.commit("second")


def test_undo_and_redo_say_what_they_did(here: Cluster, tmp_path: Path) -> None:
    data = tmp_path / "data"
    make_dot(here, data)
    tip = here.tip()
    would = here.run("undo", "-n").stdout
    assert would.startswith("would undo commit (") and here.tip() == tip
    done = here.run("undo")
    assert done.stdout.startswith("undo commit (") and "branch/master" in done.stdout
    assert here.messages() == ["first"] and (data / "a").read_text() == "two!\n"
    assert "* __default__/a" in here.run("status").stdout
    (taken,) = here.run("redo", "--json").summary()["operations"]
    assert taken["command"] == "commit" and here.tip() == tip
    assert here.run("-q", "undo", "2").stdout == ""
    error = here.refused("undo", "9", "--json", code=4, saying="then: there is nothing more")
    assert error.error()["facts"]["undone"] == 1 and here.dots() == []
    assert len(error.summary()["operations"]) == 1
    assert data.joinpath("a").read_text() == "two!\n"


def test_uncommitted_changes_come_back_uncommitted(here: Cluster, tmp_path: Path) -> None:
    data = tmp_path / "data"
    make_dot(here, data)
    (data / "a").write_text("precious\n")
    (data / "new").write_text("new\n")
    before, status = describe_tree(data), here.run("status").stdout
    here.run("reset", "--hard", "HEAD^")
    (data / "a").write_text("written since\n")
    undone = here.run("undo")
    assert "kept as stash/undo-" in undone.stderr
    assert describe_tree(data) == before and here.run("status").stdout == status
    told = here.run("redo", "-n").stdout
    assert "branch/master" in told and "stash/" not in told and "  commit " not in told
    told = here.run("redo", "-n", "-v").stdout
    assert "branch/master" in told and "stash/reset-" in told and "  commit " in told
    here.run("redo")
    assert (data / "a").read_text() == "written since\n"


def test_a_branch_that_a_peer_moved_since_is_not_turned_back(
    here: Cluster, make_cluster: MakeCluster
) -> None:
    here.init("app", {"a": "one\n"})
    here.commit("first")
    peer = make_cluster("peer")
    peer.add_remote("origin", here)
    peer.run("clone", "origin", "app")
    here.commit("second")
    second = here.tip()
    peer.run("pull", "origin", "app")
    peer.write("app", {"a": "theirs\n"})
    peer.commit("third")
    peer.run("push", "origin", "app")
    third = here.tip()
    error = here.refused("undo", "--json", code=18, saying="has moved since").error()
    assert error["code"] == "cannot-undo"
    facts = error["facts"]
    assert (facts["ref"], facts["expected"], facts["actual"]) == ("branch/master", second, third)
    assert here.tip() == third
    listed = here.run("op", "log", "--json").json()
    assert facts["by"] in {operation["seq"] for operation in listed}
    told = peer.run("undo").stderr
    assert "it keeps what was pushed" in told and here.tip() == third


def test_a_pull_is_taken_back_with_its_tree(here: Cluster, make_cluster: MakeCluster) -> None:
    here.init("app", {"a": "one\n"})
    here.commit("first")
    peer = make_cluster("peer")
    peer.add_remote("origin", here)
    peer.run("clone", "origin", "app")
    before, first = describe_tree(peer.tree("app")), peer.tip()
    here.write("app", {"a": "two!\n", "b": "new\n"})
    here.commit("second")
    peer.run("pull", "origin", "app")
    after, second = describe_tree(peer.tree("app")), peer.tip()
    assert peer.files("app") == {"a": "two!\n", "b": "new\n"}
    assert "stash/" not in peer.run("op", "log").stdout
    (taken,) = peer.run("undo", "--json").summary()["operations"]
    assert taken["command"] == "pull" and taken["stashes"] == []
    assert describe_tree(peer.tree("app")) == before and peer.tip() == first
    assert peer.run("status", "--json").json()["changes"] == []
    peer.run("redo")
    assert describe_tree(peer.tree("app")) == after and peer.tip() == second


def test_a_clone_is_taken_back_and_made_again(here: Cluster, make_cluster: MakeCluster) -> None:
    here.init("app", {"a": "one\n"})
    here.commit("first")
    peer = make_cluster("peer")
    peer.add_remote("origin", here)
    tree = peer.directory / "tree"
    peer.run("clone", "origin", "app", "--at", tree)
    peer.refused("undo", "9", code=4)
    assert peer.dots() == [] and (tree / "a").read_text() == "one\n"
    assert peer.run("remote").stdout == ""
    peer.refused("redo", "9", code=4)
    assert peer.messages() == ["first"]
    assert peer.run("status", "--json").json()["changes"] == []
    (tree / "a").write_text("two!\n")
    peer.commit("second")
    peer.run("push", "origin")
    assert here.messages() == ["first", "second"]


def test_a_killed_undo_of_a_reset_is_finished_by_the_next_command(
    here: Cluster, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3000):
        (data / f"{number:04}").write_text("one\n")
    here.run("init", "app", "--at", data)
    here.commit("first")
    for number in range(3000):
        (data / f"{number:04}").write_text("two!\n")
    here.commit("second")
    tip = here.tip()
    (data / "0000").write_text("uncommitted\n")
    before = describe_tree(data)
    here.run("reset", "--hard", "HEAD^")
    undoing = here.start("undo")
    wait_until(
        lambda: (data / "0001").read_text() != "one\n", what="the undo switches", deadline_s=60
    )
    undoing.kill()
    assert (data / "2999").read_text() == "one\n", "killed too late"
    assert here.run("status", "--json").json()["switching"] is True
    assert here.tip() == tip
    here.run("stash", "push", "-m", "what the undo brought back")
    here.run("stash", "pop")
    assert describe_tree(data) == before
    here.run("undo", "2")
    assert describe_tree(data) == before
    here.run("redo", "3")  # the stashing, and then the reset again
    assert (data / "2999").read_text() == "one\n"


def test_op_log_op_show_reflog_and_op_restore(here: Cluster, tmp_path: Path) -> None:
    data = tmp_path / "data"
    make_dot(here, data)
    log = here.run("op", "log", "--json", "-n", "2").json()
    assert [operation["command"] for operation in log] == ["commit", "commit"]
    first = log[1]["last_seq"]
    text = here.run("op", "log").stdout
    assert text.splitlines()[0].startswith(f"{log[0]['seq']} ") and "(commit)" in text
    shown = here.run("op", "show", str(first), "--json").json()
    assert [event["type"] for event in shown["events"]] == ["CommitsAdded", "RefChanged"]
    assert f"{first} RefChanged" in here.run("op", "show", str(first)).stdout
    reflog = here.run("reflog").stdout.splitlines()
    assert reflog[0].startswith("master@{0} " + here.tip()[:12]) and len(reflog) == 2
    assert here.run("reflog", "-n", "1", "--json", "master").json()[0]["kind"] == "commit"
    here.refused("reflog", "absent", code=10)
    assert "branch/master" in here.run("op", "restore", "-n", str(first)).stdout
    assert here.messages() == ["first", "second"]
    here.run("op", "restore", str(first))
    assert here.messages() == ["first"] and (data / "a").read_text() == "one\n"
    here.refused("op", "restore", str(first), code=4)
    here.run("undo")
    assert here.messages() == ["first", "second"] and (data / "a").read_text() == "two!\n"
    assert "(undone)" in here.run("op", "log").stdout
    here.refused("op", "restore", "99999", code=10)
    here.refused("op", "show", "0", code=2)


def test_the_store_as_it_was(here: Cluster, tmp_path: Path) -> None:
    data = tmp_path / "data"
    make_dot(here, data)
    first = str(here.run("op", "log", "--json").json()[1]["last_seq"])
    here.run("branch", "topic")
    here.run("dot", "delete", "-f", "app")
    assert here.messages("--at-op", first, dot="app") == ["first"]
    at = ("--at-op", first)
    assert here.run(*at, "branch").stdout == "* master\n"
    assert here.run("cat", *at, "HEAD:__default__/a").stdout == "one\n"
    assert here.run("ls", *at, "HEAD:__default__").stdout.strip().endswith("a")
    assert here.run("list", "-H", *at).stdout.split("\t")[0] == "app"
    assert len(here.run("reflog", *at, "--json").json()) == 1
    assert here.run("op", "log", *at, "--json").json()[0]["command"] == "commit"
    for command in (
        ("branch", "new"),
        ("commit", "-m", "x"),
        ("undo",),
        ("status",),
        ("init", "y"),
    ):
        here.refused(*command, *at, code=2)
    here.refused("log", "--at-op", "99999", code=10)
    here.refused("log", "--at-op", "0", code=2)
    assert here.dots() == []


def test_the_help_says_what_cannot_be_brought_back(here: Cluster) -> None:
    text = " ".join(here.run("undo", "--help").stdout.split())
    for word in ("prune", "gc", "purged", "--discard", "remote has after a push"):
        assert word in text, word


def test_bad_input_changes_nothing(here: Cluster, tmp_path: Path) -> None:
    make_dot(here, tmp_path / "data")
    before = here.run("op", "log", "--json").stdout
    for command in (
        ("undo", "0"),
        ("undo", "-1"),
        ("undo", "many"),
        ("undo", "2", "--op", "3"),
        ("undo", "--op", "1"),
        ("redo", "0"),
    ):
        here.refused(*command, code=2)
    here.refused("undo", "--op", "99999", code=10)
    here.refused("undo", "--dot", "absent", code=10)
    here.refused("redo", code=4)
    assert json.loads(here.run("op", "log", "--json").stdout) == json.loads(before)
