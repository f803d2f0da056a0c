"""Partial clones: every commit, and of its tree only some subdots."""

import random
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, MakeCluster


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


@pytest.fixture
def origin(make_cluster: MakeCluster) -> Cluster:
    """A dot with three subdots, the second of them large, and three commits."""
    cluster = make_cluster("origin")
    cluster.init("app")
    for number in range(3):
        cluster.write("app.db", {"rows": f"row {number}", "deep/er": noise(9000, number)})
        cluster.write("app.media", {"film": noise(700_000, number)})
        cluster.write("app", {"readme": f"text {number}"})
        cluster.commit(f"c{number}")
    return cluster


def root(cluster: Cluster) -> dict[str, str]:
    """Files of the whole tree, by path."""
    return cluster.files("app.__root__")


def test_a_partial_clone_commits_pushes_and_pulls(
    make_cluster: MakeCluster, origin: Cluster
) -> None:
    part, full = make_cluster("part"), make_cluster("full")
    for cluster in (part, full):
        cluster.add_remote("origin", origin)
    full.run("clone", "origin", "app")
    got = part.run("clone", "origin", "app", "--subdot", "db", "--json").summary()
    assert (got["commits_received"], got["commits_hollow"]) == (3, 0)
    assert got["bytes_received"] < 60_000
    assert set(root(part)) == {"db/rows", "db/deep/er"}
    assert part.run("status", "--json").json()["changes"] == []
    assert part.run("dot", "show", "app", "--json").json()["subdots"] == ["db"]
    assert part.messages() == ["c0", "c1", "c2"]
    part.refused("cat", "HEAD:media/film", code=10, saying="only some subdots")
    assert part.run("cat", "HEAD~1:db/rows").stdout == "row 1"
    assert "media" not in part.run("diff", "HEAD~2", "HEAD").stdout
    assert part.run("fsck", "--full", "--json").summary()["problems"] == []

    part.write("app.db", {"rows": "changed in the partial clone", "new": "x"})
    (part.tree("app.db") / "deep" / "er").unlink()
    assert {c["path"] for c in part.run("status", "--json").json()["changes"]} == {
        *("db/rows", "db/new", "db/deep/er")
    }
    part.commit("from part")
    assert part.run("status", "--json").json()["changes"] == []
    pushed = part.run("push", "origin", "app", "--json").summary()
    assert pushed["bytes_sent"] < 20_000
    before = root(full)
    full.run("pull", "origin", "app")
    after = root(full)
    assert after["db/rows"] == "changed in the partial clone" and "db/deep/er" not in after
    assert after["media/film"] == before["media/film"]
    assert after["__default__/readme"] == "text 2"
    assert full.run("fsck", "--full", "--json").summary()["problems"] == []

    # the other subdots change elsewhere; the partial clone follows and writes its own only
    full.write("app.media", {"film": noise(700_000, 9)})
    full.write("app.db", {"rows": "from full"})
    full.commit("both changed")
    full.run("push", "origin", "app")
    pulled = part.run("pull", "origin", "app", "--json").summary()
    assert pulled["bytes_received"] < 20_000
    assert root(part) == {"db/rows": "from full", "db/new": "x"}
    assert part.run("status", "--json").json()["changes"] == []
    part.run("reset", "--hard", "HEAD~1")
    assert root(part)["db/rows"] == "changed in the partial clone"
    part.run("checkout", "-b", "side")
    part.write("app.db", {"rows": "on side"})
    part.commit("on side")
    part.run("push", "origin", "app", "side")
    assert part.run("fsck", "--full", "--json").summary()["problems"] == []
    assert origin.run("fsck", "--full", "--json").summary()["problems"] == []


def test_a_partial_clone_cannot_give_what_it_lacks(
    make_cluster: MakeCluster, origin: Cluster
) -> None:
    part, empty = make_cluster("part"), make_cluster("empty")
    part.add_remote("origin", origin)
    part.add_remote("empty", empty)
    part.run("clone", "origin", "app", "--subdot", "db")
    part.refused("push", "empty", "app", code=10, saying="only some subdots")
    assert empty.run("list", "-H").stdout == ""
    other, same = make_cluster("other"), make_cluster("same")
    other.add_remote("part", part)
    other.refused("clone", "part", "app", code=10)
    same.add_remote("part", part)
    same.run("clone", "part", "app", "--subdot", "db")
    assert set(root(same)) == {"db/rows", "db/deep/er"}


def test_what_is_asked_for_must_make_sense(
    make_cluster: MakeCluster, origin: Cluster, tmp_path_factory: pytest.TempPathFactory
) -> None:
    part = make_cluster("part")
    part.add_remote("origin", origin)
    part.refused("clone", "origin", "app", "--subdot", "nothing", code=10, saying="media")
    assert part.run("list", "-H").stdout == ""
    part.refused("clone", "origin", "app", "--subdot", "a/b", code=2)
    directory = tmp_path_factory.mktemp("at") / "dir"
    part.refused("clone", "origin", "app", "--subdot", "db", "--at", directory, code=2)
    part.run("clone", "origin", "app", "--subdot", "__default__", "--at", directory)
    assert (directory / "readme").read_text() == "text 2"
    (directory / "readme").write_text("at")
    part.commit("at")
    part.run("push", "origin", "app")
    assert set(root_of(origin, "HEAD")) == {"__default__", "db", "media"}
    part.refused("clone", "origin", "app", "--subdot", "db", code=2, saying="here already")


def test_a_subdot_that_is_not_kept_cannot_be_committed(
    make_cluster: MakeCluster, origin: Cluster
) -> None:
    part = make_cluster("part")
    part.add_remote("origin", origin)
    part.run("clone", "origin", "app", "--subdot", "db", "--subdot", "__default__", "--depth", "1")
    part.write("app", {"readme": "changed"})
    tree = part.tree("app.__root__")
    (tree / "media").mkdir()
    (tree / "media" / "film").write_text("not the film")
    part.refused("commit", "-m", "no", code=17, saying="media")
    (tree / "media" / "film").unlink()
    (tree / "media").rmdir()
    part.commit("yes")
    part.run("push", "origin", "app")
    shown = origin.run("ls", "HEAD:media", "--json", "--dot", "app").json()
    assert [entry["size"] for entry in shown] == [700_000]
    part.run("fetch", "origin", "app", "--unshallow")
    assert part.run("fsck", "--full", "--json").summary()["problems"] == []


def test_the_path_of_a_subdot_that_is_not_kept_is_refused_and_nothing_made(
    make_cluster: MakeCluster, origin: Cluster
) -> None:
    part = make_cluster("part")
    part.add_remote("origin", origin)
    part.run("clone", "origin", "app", "--subdot", "db")
    for name in ("app", "app.media"):
        done = part.refused("dot", "path", name, code=10, saying="not one of those kept here")
        assert "dm dot path app.db" in done.stderr
    tree = Path(part.run("dot", "path", "app.__root__").stdout.rstrip())
    assert [path.name for path in tree.iterdir()] == ["db"]
    assert part.run("dot", "path", "app.db").stdout.rstrip() == str(tree / "db")
    assert part.run("status").stdout == ""


def root_of(cluster: Cluster, revision: str) -> list[str]:
    return [entry["path"] for entry in cluster.run("ls", f"{revision}:", "--json").json()]


def test_a_partial_clone_merges_unless_both_sides_changed_what_it_lacks(
    make_cluster: MakeCluster, origin: Cluster
) -> None:
    origin.run("checkout", "-b", "one")
    origin.write("app.media", {"film": noise(5000, 21)})
    origin.write("app.db", {"rows": "from one"})
    origin.commit("one")
    origin.run("checkout", "master")
    origin.run("checkout", "-b", "two")
    origin.write("app.media", {"film": noise(5000, 22)})
    origin.commit("two")
    origin.run("checkout", "master")
    part, full = make_cluster("part"), make_cluster("full")
    for cluster in (part, full):
        cluster.add_remote("origin", origin)
    part.run("clone", "origin", "app", "--subdot", "db")
    part.write("app.db", {"mine": "here"})
    part.commit("mine")
    part.run("merge", "one", "-m", "merge one")
    assert root(part)["db/rows"] == "from one" and root(part)["db/mine"] == "here"
    tip, before = part.tip(), root(part)
    part.refused("merge", "two", "-m", "merge two", code=10, saying="only some subdots")
    assert (part.tip(), root(part)) == (tip, before)
    part.run("push", "origin", "app")
    full.run("clone", "origin", "app")
    assert (full.tree("app.media") / "film").read_bytes() == noise(5000, 21)
    assert full.files("app.db")["mine"] == "here"
    assert full.run("fsck", "--full", "--json").summary()["problems"] == []
