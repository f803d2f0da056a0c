"""Dotmesh's acceptance scenarios between two clusters, under Dotmesh's names (strict where it was weak)."""

from pathlib import Path

import pytest

from tests.support.cluster import Cluster, MakeCluster
from tests.support.keys import known_hosts_line
from tests.support.sshd import StockSshd, has_sshd
from tests.support.tree import describe_tree

Pair = tuple[Cluster, Cluster]


@pytest.fixture
def pushed(pair: Pair) -> Pair:
    """`near` has made `apples` with one commit and pushed it to `far`, which works on it too."""
    near, far = pair
    near.init("apples", {"HELLO": "world"})
    near.commit("hello")
    near.run("push", "far")
    far.run("switch", "apples")
    return pair


def commit_file(cluster: Cluster, name: str, *, dot: str = "apples") -> str:
    """Write a file named `name` and commit it under that name."""
    cluster.write(dot, {name: name})
    return cluster.commit(name)


def diverge(near: Cluster, far: Cluster) -> tuple[str, str]:
    """A commit on each side that the other lacks; their ids, near's first."""
    return commit_file(near, "NEAR"), commit_file(far, "FAR")


def diverged_branches(cluster: Cluster) -> list[str]:
    """Branches that a stash has made of master's losing line."""
    return [name for name in cluster.branches() if name.startswith("master-DIVERGED-")]


# --- reaching the other side -----------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ssh://dm@127.0.0.1:{port}", "dm@127.0.0.1:{port}"])
def test_specify_port(make_cluster: MakeCluster, form: str) -> None:
    near, far = make_cluster("near"), make_cluster("far")
    server = far.serve()
    server.authorize(near.user_key, role="admin")
    near.trust(server, server.port)
    near.run("remote", "add", "far", form.format(port=server.port))
    near.init("apples", {"HELLO": "world"})
    near.commit("hello")
    near.run("push", "far")
    assert far.messages(dot="apples") == ["hello"]


def test_push_and_clone_through_a_stock_sshd(make_cluster: MakeCluster, tmp_path: Path) -> None:
    """The same behind OpenSSH's server, where a forced command runs `dm serve --stdio`."""
    if not has_sshd():
        pytest.skip("sshd is not installed")
    near, far, other = make_cluster("near"), make_cluster("far"), make_cluster("other")
    sshd = StockSshd(tmp_path / "sshd", far)
    try:
        for client in (near, other):
            sshd.authorize(client.user_key)
            client.known_hosts.write_text(known_hosts_line(sshd.port, sshd.host_key.public))
            client.run("remote", "add", "far", sshd.url)
        near.init("apples", {"HELLO": "world"})
        near.commit("hello")
        near.run("push", "far")
        other.run("clone", "far", "apples")
    finally:
        sshd.close()
    assert other.messages() == ["hello"]
    assert describe_tree(other.tree("apples")) == describe_tree(near.tree("apples"))


# --- push --------------------------------------------------------------------------------------------


def test_push_commit_branch_extant_base(pushed: Pair) -> None:
    """Full push, incremental push, then a branch whose base is there already."""
    near, far = pushed
    commit_file(near, "SECOND")
    near.run("push", "far")
    assert far.messages() == ["hello", "SECOND"]
    near.run("checkout", "-b", "newbranch")
    commit_file(near, "THIRD")
    near.run("push", "far")
    far.run("checkout", "newbranch")
    assert far.messages() == ["hello", "SECOND", "THIRD"]
    assert far.files("apples") == near.files("apples")
    assert describe_tree(far.tree("apples")) == describe_tree(near.tree("apples"))


def test_push_commit_branch_no_extant_base(pair: Pair) -> None:
    """One push of the leaf of master-newbranch-newbranch2-newbranch3 brings all it stems from."""
    near, far = pair
    near.init("apples", {"HELLO": "world"})
    near.commit("hello")
    for name in ("newbranch", "newbranch2", "newbranch3"):
        near.run("checkout", "-b", name)
        commit_file(near, f"on {name}")
    near.run("push", "far")
    far.run("switch", "apples")
    far.run("checkout", "newbranch3")
    assert far.messages() == ["hello", "on newbranch", "on newbranch2", "on newbranch3"]
    assert set(far.branches()) == {"master", "newbranch", "newbranch2", "newbranch3"}
    assert far.files("apples") == near.files("apples")


def test_push_of_what_is_there_already_is_done(pushed: Pair) -> None:
    near, far = pushed
    summary = near.run("push", "far", "--json").summary()
    assert summary["commits_sent"] == 0
    assert summary["objects_sent"] == 0
    assert far.messages() == ["hello"]


@pytest.mark.parametrize("dirt_bytes", [1, 1024 * 1024])
def test_dirty_detected(pushed: Pair, dirt_bytes: int) -> None:
    """Uncommitted changes where data would be written refuse the push and stay as they are.

    Also Dotmesh's DirtyImmediate: dirt is seen at once, not when a poll next comes round.
    """
    near, far = pushed
    far.tree("apples")
    far.write("apples", {"DIRT": "x" * dirt_bytes})
    before = describe_tree(far.tree("apples"))
    commit_file(near, "SECOND")
    near.refused("push", "far", code=18, saying="uncommitted changes on volume where data")
    assert far.messages() == ["hello"]
    assert describe_tree(far.tree("apples")) == before


def test_dirty_immediate(pushed: Pair) -> None:
    """A change made right after a commit that keeps size and length of the file's name counts."""
    near, far = pushed
    commit_file(near, "SECOND")
    hello = far.tree("apples") / "HELLO"
    hello.write_text("dlrow")
    near.refused("push", "far", code=18, saying="uncommitted")
    assert hello.read_text() == "dlrow"


def test_diverged(pushed: Pair) -> None:
    """The refusal is typed, names the way out, and changes nothing on either side."""
    near, far = pushed
    ours, theirs = diverge(near, far)
    refused = near.refused("push", "far", "--json", code=14)
    assert refused.error()["code"] == "diverged"
    assert near.refused("push", "far", code=14, saying="diverged").stderr.count("hint") == 1
    assert (near.tip(), far.tip()) == (ours, theirs)
    assert far.branches() == ["master"]


def test_push_stash_diverged(pushed: Pair) -> None:
    """The target's line is kept as a branch, whole; its master is what was pushed."""
    near, far = pushed
    ours, theirs = diverge(near, far)
    near.run("push", "far", "--stash-on-divergence")
    (kept,) = diverged_branches(far)
    assert far.tip("master") == ours
    assert far.tip(kept) == theirs
    assert far.files("apples") == near.files("apples")
    far.run("checkout", kept)
    assert far.files("apples") == {"HELLO": "world", "FAR": "FAR"}


def test_push_stash_to_snaps_ahead(pushed: Pair) -> None:
    """The target is only ahead: nothing to send, nothing is moved aside, nothing goes back."""
    near, far = pushed
    theirs = commit_file(far, "FAR")
    near.run("push", "far", "--stash-on-divergence")
    assert far.tip() == theirs
    assert far.branches() == ["master"]
    near.refused("push", "far", code=14)


def test_reset_after_push_then_push(pushed: Pair) -> None:
    """A commit made on the target and reset there does not stand in the way of the next push."""
    near, far = pushed
    commit_file(far, "FAR")
    far.run("reset", "--hard", "HEAD^")
    second = commit_file(near, "SECOND")
    near.run("push", "far")
    assert far.messages() == ["hello", "SECOND"]
    assert far.tip() == second
    assert far.files("apples") == {"HELLO": "world", "SECOND": "SECOND"}


def test_bug_74_missing_metadata(pair: Pair) -> None:
    near, far = pair
    near.init("apples", {"HELLO": "world"})
    near.commit("first", "-d", "apples=green")
    near.commit("second")
    near.run("push", "far")
    log = far.run("log", "--dot", "apples").stdout
    assert "    first\n" in log
    assert "    second\n" in log
    assert "apples: green\n" in log


# --- clone and pull --------------------------------------------------------------------------------------


@pytest.fixture
def cloned(pair: Pair) -> Pair:
    """`far` has made `apples` with one commit; `near` has cloned it."""
    near, far = pair
    far.init("apples", {"HELLO": "world"})
    far.commit("hello")
    near.run("clone", "far", "apples")
    return pair


def test_clone(cloned: Pair) -> None:
    """Clone, incremental pull, pull of a branch with its base here."""
    near, far = cloned
    near.run("switch", "apples")
    assert near.messages() == ["hello"]
    assert describe_tree(near.tree("apples")) == describe_tree(far.tree("apples"))
    commit_file(far, "SECOND")
    near.run("pull", "far")
    assert near.messages() == ["hello", "SECOND"]
    far.run("checkout", "-b", "newbranch")
    commit_file(far, "THIRD")
    near.run("pull", "far", "apples", "newbranch")
    near.run("checkout", "newbranch")
    assert near.messages() == ["hello", "SECOND", "THIRD"]
    assert near.files("apples") == far.files("apples")


def test_clone_id_clash(cloned: Pair) -> None:
    """One dot has one name in a cluster: cloning it under a second one is refused."""
    near, far = cloned
    refused = near.refused("clone", "far", "apples", "--local-name", "pears", "--json", code=1)
    assert refused.error()["code"] == "dot-id-clash"
    assert near.dots() == ["apples"]
    assert far.messages() == ["hello"]


def test_clone_onto_another_dot_of_that_name_is_refused(pair: Pair) -> None:
    """Dotmesh: "Cannot reconcile filesystems with different ids"."""
    near, far = pair
    for side in pair:
        side.init("apples", {"HELLO": side.name})
        side.commit(side.name)
    near.refused("pull", "far", code=10)
    for command in (["clone", "far", "apples"], ["push", "far"]):
        refused = near.refused(*command, "--json", code=1)
        assert refused.error()["code"] in ("exists", "dot-id-clash"), refused.describe()
    assert near.messages() == ["near"]
    assert far.messages() == ["far"]


def test_pull_refuses_diverged_lines(cloned: Pair) -> None:
    near, far = cloned
    ours, theirs = diverge(near, far)
    near.refused("pull", "far", code=14, saying="diverged")
    assert (near.tip(), far.tip()) == (ours, theirs)


def test_clone_stash_diverged(cloned: Pair) -> None:
    """Dotmesh's clone was also its pull; here `pull` is what brings an existing dot up to date."""
    near, far = cloned
    ours, theirs = diverge(near, far)
    near.run("pull", "far", "--stash-on-divergence")
    (kept,) = diverged_branches(near)
    assert near.tip("master") == theirs
    assert near.tip(kept) == ours
    assert near.files("apples") == {"HELLO": "world", "FAR": "FAR"}


def test_clone_stash_to_snaps(cloned: Pair) -> None:
    """Only ahead locally: the pull has nothing to do and makes no branch."""
    near, _ = cloned
    ours = commit_file(near, "NEAR")
    near.run("pull", "far", "--stash-on-divergence")
    assert near.tip() == ours
    assert near.branches() == ["master"]


def test_clone_stash_dirty(cloned: Pair) -> None:
    """Uncommitted changes go to the kept branch too, and pull without the option refuses (18)."""
    near, far = cloned
    near.write("apples", {"DIRT": "not committed"})
    theirs = commit_file(far, "FAR")
    near.refused("pull", "far", code=18, saying="uncommitted")
    assert near.files("apples") == {"HELLO": "world", "DIRT": "not committed"}
    near.run("pull", "far", "--stash-on-divergence")
    (kept,) = diverged_branches(near)
    assert near.tip("master") == theirs
    assert near.files("apples") == {"HELLO": "world", "FAR": "FAR"}
    near.run("checkout", kept)
    assert near.files("apples") == {"HELLO": "world", "DIRT": "not committed"}


def test_fetch_moves_nothing_but_what_is_known_of_the_remote(cloned: Pair) -> None:
    near, far = cloned
    ours = near.tip()
    theirs = commit_file(far, "SECOND")
    near.run("fetch", "far")
    assert near.tip() == ours
    assert near.tip("far/master") == theirs
    assert near.files("apples") == {"HELLO": "world"}


# --- many --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_push_lots_of_commits(pair: Pair) -> None:
    """Dotmesh's stress test: 1,000 commits in one push, all of them in the target's log."""
    count = 1000
    near, far = pair
    near.init("apples", {"HELLO": "world"})
    number_file = near.tree("apples") / "number"
    for number in range(count):
        number_file.write_text(str(number))
        near.run("commit", "-q", "-m", f"commit {number}")
    summary = near.run("push", "far", "--json", timeout_s=300).summary()
    assert summary["commits_sent"] == count
    assert far.messages(dot="apples") == [f"commit {number}" for number in range(count)]
    assert far.files("apples") == {"HELLO": "world", "number": str(count - 1)}
    assert far.run("cat", "HEAD~500:__default__/number", "--dot", "apples").stdout == "499"
