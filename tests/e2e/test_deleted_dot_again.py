"""A deleted dot that comes back by clone or push is an ordinary dot again, and sends little."""

from tests.support.cluster import Cluster


def make_pushed(near: Cluster) -> str:
    near.init("apples", {"HELLO": "world"})
    commit = near.commit("hello")
    near.run("push", "far")
    return commit


def test_dot_deleted_here_is_cloned_again(pair: tuple[Cluster, Cluster]) -> None:
    near, _ = pair
    commit = make_pushed(near)
    near.run("dot", "delete", "-f", "apples")
    near.run("clone", "far", "apples")
    assert near.messages(dot="apples") == ["hello"]
    assert near.files("apples") == {"HELLO": "world"}
    assert near.run("show", "HEAD", "--json").json()["id"] == commit
    near.write("apples", {"HELLO": "again"})
    near.commit("again")
    near.run("push", "far")
    assert near.run("fsck", "--full").code == 0


def test_dot_deleted_there_is_pushed_again(pair: tuple[Cluster, Cluster]) -> None:
    near, far = pair
    make_pushed(near)
    far.run("dot", "delete", "-f", "apples")
    summary = near.run("push", "far", "--json").summary()
    assert [ref["status"] for ref in summary["refs"]] == ["created"]
    assert far.messages(dot="apples") == ["hello"]
    assert far.files("apples") == {"HELLO": "world"}
    assert far.run("fsck", "--full").code == 0
