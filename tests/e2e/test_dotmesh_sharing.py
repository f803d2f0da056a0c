"""Dotmesh's acceptance scenarios with several users of one cluster, under Dotmesh's names."""

import pytest

from tests.support.cluster import Cluster, MakeCluster

Three = tuple[Cluster, Cluster, Cluster]


@pytest.fixture
def three(make_cluster: MakeCluster) -> Three:
    """`common`, which serves, and alice's and bob's clusters, which know it as `common`."""
    common, alice, bob = make_cluster("common"), make_cluster("alice"), make_cluster("bob")
    for user in (alice, bob):
        user.add_remote("common", common, user=user.name)
    return common, alice, bob


def share(common: Cluster, dot: str, user: Cluster) -> None:
    """Let `user` read and write `dot`, as an administrator of nothing else but their own dots."""
    rules = {"user": user.name, "role": "admin", "dots": f"{user.name}/*,{dot}"}
    common.serve().authorize(user.user_key, **rules)


def unshare(common: Cluster, user: Cluster) -> None:
    """Back to the user's own namespace."""
    common.serve().authorize(user.user_key, user=user.name)


def make_and_push(cluster: Cluster, dot: str, files: dict[str, str]) -> None:
    """A new dot with one commit named "from USER", pushed without naming a namespace."""
    cluster.init(dot, files)
    cluster.commit(f"from {cluster.name}")
    cluster.run("push", "common", dot)


def test_two_users_same_named_volume(three: Three) -> None:
    """alice/apples and bob/apples live side by side; each can have the other's under a name."""
    common, alice, bob = three
    make_and_push(alice, "apples", {"WHO": "alice"})
    make_and_push(bob, "apples", {"WHO": "bob"})
    assert sorted(common.dots()) == ["alice/apples", "bob/apples"]
    share(common, "alice/apples", bob)
    share(common, "bob/apples", alice)
    alice.run("clone", "common", "bob/apples", "--local-name", "bobs-apples")
    bob.run("clone", "common", "alice/apples", "--local-name", "alices-apples")
    assert alice.files("bobs-apples") == {"WHO": "bob"}
    assert bob.files("alices-apples") == {"WHO": "alice"}
    bob.write("apples", {"MORE": "from bob"})
    bob.commit("more", dot="apples")
    bob.run("push", "common", "apples")
    alice.run("pull", "common", "bobs-apples")
    assert alice.files("bobs-apples") == {"WHO": "bob", "MORE": "from bob"}


def test_share_branches(three: Three) -> None:
    """Cloning only a branch brings what both lines hold."""
    common, alice, bob = three
    make_and_push(alice, "cress", {"BASE": "master"})
    share(common, "alice/cress", bob)
    alice.run("checkout", "-b", "mustard")
    alice.write("cress", {"MUSTARD": "branch"})
    alice.commit("on mustard")
    alice.run("push", "common")
    bob.run("clone", "common", "alice/cress", "mustard", "--local-name", "cress")
    bob.run("checkout", "mustard", "--dot", "cress")
    assert bob.files("cress") == {"BASE": "master", "MUSTARD": "branch"}
    assert bob.messages(dot="cress") == ["from alice", "on mustard"]


def test_default_remote_namespace(three: Three) -> None:
    """A dot pushed by name alone lands in the namespace of the user who pushes."""
    common, alice, _ = three
    make_and_push(alice, "pears", {"WHO": "alice"})
    assert common.dots() == ["alice/pears"]


def test_default_remote_volume(three: Three) -> None:
    """The first push or clone records the upstream; later ones need no names."""
    common, alice, bob = three
    make_and_push(alice, "bananas", {"WHO": "alice"})
    assert upstream_of(alice, "bananas") == ["common", "alice/bananas"]
    share(common, "alice/bananas", bob)
    bob.run("clone", "common", "alice/bananas")
    bob.run("switch", "alice/bananas" if "alice/bananas" in bob.dots() else "bananas")
    bob.write(bob.dots()[0], {"MORE": "from bob"})
    bob.commit("from bob")
    bob.run("push", "common")
    alice.run("pull", "common")
    assert alice.files("bananas") == {"WHO": "alice", "MORE": "from bob"}
    alice.commit("from alice again")
    alice.run("push", "common")
    bob.run("pull", "common")
    assert bob.messages() == ["from alice", "from bob", "from alice again"]


def upstream_of(cluster: Cluster, dot: str) -> list[str]:
    """The default upstream as `dm dot show -H` prints it: remote and ns/name."""
    lines = cluster.run("dot", "show", "-H", dot).stdout.splitlines()
    fields = [line.split("\t") for line in lines]
    (upstream,) = [line[1:3] for line in fields if line[0] == "defaultUpstreamDot"]
    return upstream


def test_default_remote_namespace_override(three: Three) -> None:
    """`set-upstream` may name a dot that does not exist yet.

    Pushing there is refused while the server has this very dot under its first name: one dot has
    one name in a cluster.
    """
    common, alice, _ = three
    make_and_push(alice, "oranges", {"WHO": "alice"})
    alice.run("dot", "set-upstream", "oranges", "common", "alice/tangerines")
    assert upstream_of(alice, "oranges") == ["common", "alice/tangerines"]
    refused = alice.refused("push", "common", "oranges", "--json", code=1)
    assert refused.error()["code"] == "dot-id-clash"
    assert common.dots() == ["alice/oranges"]


def test_delete_not_mine_fails(three: Three) -> None:
    """What bob may not read he cannot find either, so that names do not leak."""
    common, alice, bob = three
    make_and_push(alice, "apples", {"WHO": "alice"})
    assert bob.run("clone", "common", "alice/apples", check=False).code in (10, 12)
    assert bob.dots() == []
    assert common.messages(dot="alice/apples") == ["from alice"]


def test_namespace_authorisation(three: Three) -> None:
    """Nobody pushes into somebody else's namespace, nor into one that does not exist."""
    common, _, bob = three
    bob.init("apples", {"WHO": "bob"})
    bob.commit("from bob")
    for name in ("alice/apples", "nobody/apples"):
        bob.refused("push", "common", "apples", f"--remote-name={name}", code=12)
    assert common.dots() == []


def test_namespace_authorisation_admin(three: Three, make_cluster: MakeCluster) -> None:
    """An administrator may."""
    common, _, _ = three
    admin = make_cluster("admin")
    admin.add_remote("common", common)
    admin.init("apples", {"WHO": "admin"})
    admin.commit("from admin")
    admin.run("push", "common", "apples", "--remote-name=alice/apples")
    assert common.dots() == ["alice/apples"]


def test_push_to_collaborator_volume(three: Three) -> None:
    """Dotmesh left these three empty: the owner pushes, a stranger does not, a collaborator does."""
    common, alice, bob = three
    make_and_push(alice, "apples", {"WHO": "alice"})
    share(common, "alice/apples", bob)
    bob.run("clone", "common", "alice/apples", "--local-name", "apples")
    unshare(common, bob)
    bob.write("apples", {"WHO": "bob"})
    bob.commit("from bob")
    assert bob.run("push", "common", "apples", check=False).code in (10, 12)
    assert common.messages(dot="alice/apples") == ["from alice"]
    share(common, "alice/apples", bob)
    bob.run("push", "common", "apples")
    assert common.messages(dot="alice/apples") == ["from alice", "from bob"]


def test_issue_226(three: Three) -> None:
    """A clone of only a branch leaves master usable, and a branch made there can be pushed back."""
    common, alice, bob = three
    make_and_push(alice, "cress", {"BASE": "master"})
    share(common, "alice/cress", bob)
    alice.run("checkout", "-b", "mustard")
    alice.write("cress", {"MUSTARD": "branch"})
    alice.commit("on mustard")
    alice.run("push", "common")
    bob.run("clone", "common", "alice/cress", "mustard", "--local-name", "cress")
    bob.run("switch", "cress")
    bob.run("checkout", "master")
    assert bob.messages() == ["from alice"]
    assert bob.files("cress") == {"BASE": "master"}
    bob.run("checkout", "mustard")
    bob.run("checkout", "-b", "bobs")
    bob.write("cress", {"BOB": "branch"})
    bob.commit("on bobs")
    bob.run("push", "common")
    alice.run("pull", "common", "cress", "bobs")
    alice.run("checkout", "bobs")
    assert alice.files("cress") == {"BASE": "master", "MUSTARD": "branch", "BOB": "branch"}
