"""Dotmesh's acceptance scenarios about who may do what, under Dotmesh's names.

`common` serves; alice and bob are users of it, known by their keys, without an account there.
"""

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import asyncssh
import pytest

from tests.support.cluster import Cluster, MakeCluster
from tests.support.sshd import StockSshd, has_sshd

Three = tuple[Cluster, Cluster, Cluster]


@pytest.fixture
def three(make_cluster: MakeCluster) -> Three:
    common, alice, bob = make_cluster("common"), make_cluster("alice"), make_cluster("bob")
    for user in (alice, bob):
        user.add_remote("common", common, user=user.name)
    return common, alice, bob


def push_apples(cluster: Cluster) -> None:
    """A new dot `apples` with one commit, pushed."""
    cluster.init("apples", {"WHO": cluster.name})
    cluster.commit(f"from {cluster.name}")
    cluster.run("push", "common", "apples")


def log_of(common: Cluster, dot: str = "alice/apples") -> list[str]:
    return common.messages(dot=dot)


def test_PushToAuthorizedUser(three: Three) -> None:
    """Alice pushes to her namespace; the log names her and her key, not the server's account."""
    common, alice, _ = three
    push_apples(alice)
    assert common.dots() == ["alice/apples"]
    assert log_of(common) == ["from alice"]
    newest = common.run("op", "log", "--json", "-n", "1").json()[0]
    user, _, key = newest["actor"].partition(" ")
    assert user == "alice" and key.startswith("SHA256:")
    assert common.run("dot", "show", "--json", "alice/apples").json()["namespace"] == "alice"


def test_NoPushToUnauthorizedUser(three: Three) -> None:
    """Bob neither makes a dot in alice's namespace nor pushes to one that is there."""
    common, alice, bob = three
    bob.init("apples", {"WHO": "bob"})
    bob.commit("from bob")
    bob.refused("push", "common", "apples", "--remote-name=alice/apples", code=12)
    assert common.dots() == []
    push_apples(alice)
    refused = bob.refused("push", "common", "apples", "--remote-name=alice/apples", code=12)
    assert "alice" in refused.stderr
    assert log_of(common) == ["from alice"]
    bob.refused("clone", "common", "alice/apples", "--local-name", "hers", code=10)
    log = (common.directory / "serve.log").read_text()
    assert "refused user=bob key=SHA256:" in log and "dot=alice/apples" in log
    assert "from=127.0.0.1" in log and "user=alice" not in log


def test_PushToCollaboratorVolume(three: Three) -> None:
    """Alice shares her dot from where she is; bob then reads and writes it, until she ends it."""
    common, alice, bob = three
    push_apples(alice)
    bob.refused("clone", "common", "alice/apples", "--local-name", "apples", code=10)
    alice.run("collaborator", "add", "common:apples", "bob")
    assert alice.run("collaborator", "list", "common:apples").stdout == "bob\n"
    assert common.run("collaborator", "list", "alice/apples").stdout == "bob\n"
    assert "Collaborators: bob" in common.run("dot", "show", "alice/apples").stdout
    bob.run("clone", "common", "alice/apples", "--local-name", "apples")
    bob.write("apples", {"WHO": "bob"})
    bob.commit("from bob", dot="apples")
    bob.run("push", "common", "apples")
    assert log_of(common) == ["from alice", "from bob"]
    refused = bob.refused("collaborator", "add", "common:alice/apples", "carol", code=12)
    assert "owner" in refused.stderr
    alice.run("collaborator", "rm", "common:apples", "bob")
    bob.commit("too late", dot="apples")
    assert bob.run("push", "common", "apples", check=False).code in (10, 12)
    assert log_of(common) == ["from alice", "from bob"]


def test_sharing_is_undone_and_told(three: Three) -> None:
    common, alice, _ = three
    push_apples(alice)
    common.run("collaborator", "add", "alice/apples", "bob")
    assert "shared with bob" in common.run("op", "log", "-n", "1").stdout
    common.run("undo")
    assert common.run("collaborator", "list", "alice/apples").stdout == ""
    common.run("redo")
    assert common.run("collaborator", "list", "alice/apples").stdout == "bob\n"
    assert common.refused("collaborator", "add", "alice/apples", "alice", code=2)
    assert common.refused("collaborator", "rm", "alice/apples", "zoe", code=10)


def test_DeleteNotMineFails(three: Three) -> None:
    """A collaborator has no way to delete, prune or rename: no message and no command reaches it."""
    common, alice, bob = three
    push_apples(alice)
    common.run("collaborator", "add", "alice/apples", "bob")
    asked = ("dm dot delete -f alice/apples", "dm dot rename alice/apples x", "dm prune", "sh")
    server = common.serve()

    async def ask(command: str) -> Any:
        async with asyncssh.connect(
            "127.0.0.1",
            server.port,
            username="bob",
            client_keys=[str(bob.user_key.private)],
            agent_path=None,
            known_hosts=None,
            config=None,
        ) as connection:
            return await connection.run(command, input="")

    for command in asked:
        done = asyncio.run(ask(command))
        assert (done.exit_status, done.stdout) == (1, ""), command
    bob.run("clone", "common", "alice/apples", "--local-name", "apples")
    bob.run("dot", "delete", "-f", "apples")  # his own copy is his
    assert log_of(common) == ["from alice"]


def test_NamespaceAuthorisation(three: Three) -> None:
    """Nobody pushes into a namespace that is somebody else's or nobody's; nothing is created."""
    common, _, bob = three
    bob.init("apples", {"WHO": "bob"})
    bob.commit("from bob")
    for name in ("alice/apples", "nobody/apples"):
        bob.refused("push", "common", "apples", f"--remote-name={name}", code=12)
    assert common.dots() == []
    bob.run("push", "common", "apples", "--remote-name=bob/apples")
    assert common.dots() == ["bob/apples"]


# --- roles of keys ---------------------------------------------------------------------------------


def test_an_append_only_key_adds_and_never_removes(three: Three) -> None:
    """The key of a cron job: what a thief of it can do is add."""
    common, alice, _ = three
    common.serve().authorize(alice.user_key, user="alice", role="append")
    push_apples(alice)
    alice.commit("more")
    alice.run("push", "common", "apples")
    alice.run("tag", "v1.0")
    alice.run("push", "common", "apples", "--tags")
    alice.run("reset", "--hard", "HEAD~1")
    alice.commit("another line")
    for option in ("--force-with-lease", "--stash-on-divergence"):
        alice.refused("push", "common", "apples", option, code=12)
    assert log_of(common) == ["from alice", "more"]
    alice.refused("collaborator", "add", "common:apples", "bob", code=12)
    assert common.branches(dot="alice/apples") == ["master"]


# --- behind a stock sshd ---------------------------------------------------------------------------


@pytest.fixture
def sshd(make_cluster: MakeCluster, tmp_path: Path) -> Iterator[tuple[StockSshd, Cluster]]:
    if not has_sshd():
        pytest.skip("no sshd here")
    common = make_cluster("common")
    server = StockSshd(tmp_path / "sshd", common)
    yield server, common
    server.close()


def through_sshd(client: Cluster, server: StockSshd) -> None:
    with client.known_hosts.open("a") as file:
        kind, text = server.host_key.public.split()[:2]
        file.write(f"[127.0.0.1]:{server.port} {kind} {text}\n")
    client.run("remote", "add", "common", server.url)


def ask_sshd(server: StockSshd, client: Cluster, command: str | None) -> Any:
    async def ask() -> Any:
        async with asyncssh.connect(
            "127.0.0.1",
            server.port,
            username=server.user,
            client_keys=[str(client.user_key.private)],
            agent_path=None,
            known_hosts=None,
            config=None,
        ) as connection:
            return await connection.run(command, input="", encoding=None)

    return asyncio.run(ask())


def first_bytes(server: StockSshd, client: Cluster, command: str) -> bytes:
    async def ask() -> bytes:
        async with asyncssh.connect(
            "127.0.0.1",
            server.port,
            username=server.user,
            client_keys=[str(client.user_key.private)],
            agent_path=None,
            known_hosts=None,
            config=None,
        ) as connection:
            process = await connection.create_process(command, encoding=None)
            found: bytes = await process.stdout.readexactly(8)
            return found

    return asyncio.run(ask())


def test_behind_sshd_the_forced_command_gives_one_user_with_one_role(
    sshd: tuple[StockSshd, Cluster], make_cluster: MakeCluster
) -> None:
    server, common = sshd
    alice, backup = make_cluster("alice"), make_cluster("backup")
    server.authorize(alice.user_key, "--user alice")
    server.authorize(backup.user_key, "--user backup --role read --dots alice/*")
    for client in (alice, backup):
        through_sshd(client, server)
    push_apples(alice)
    assert common.dots() == ["alice/apples"]
    backup.run("clone", "common", "alice/apples")
    backup.commit("not mine")
    assert backup.run("push", "common", "apples", check=False).code == 12
    assert log_of(common) == ["from alice"]
    actor = common.run("op", "log", "--json", "-n", "1").json()[0]["actor"]
    assert actor.split(" ")[0] == "alice"


def test_behind_sshd_only_a_session_or_one_dot_may_be_asked_for(
    sshd: tuple[StockSshd, Cluster], make_cluster: MakeCluster, tmp_path: Path
) -> None:
    """SSH_ORIGINAL_COMMAND is read as git-shell reads it: two forms, and no shell sees it."""
    server, common = sshd
    alice = make_cluster("alice")
    server.authorize(alice.user_key, "--user alice")
    common.run("init", "seed")
    marker = tmp_path / "ran"
    refused = [
        f"touch {marker}",
        f"dm serve --stdio; touch {marker}",
        f"dm serve --stdio $(touch {marker})",
        f"apples; touch {marker}",
        f"apples`touch {marker}`",
        "dm serve --stdio --home /elsewhere",
        "dm serve --stdio --user root",
        "dm dot delete -f apples",
        "alice/apples@master",
        "a" * 200,
        "dm serve --stdio " + "x" * 100_000,
    ]
    for command in refused:
        done = ask_sshd(server, alice, command)
        assert done.exit_status not in (0, None), command
        assert b"\x89DMS" not in done.stdout, command
    assert not marker.exists()
    for command in (f"dm serve --stdio --home {common.home}", "alice/apples"):
        assert first_bytes(server, alice, command) == b"\x89DMS\r\n\x1a\n", command


def test_a_role_that_cannot_be_read_lets_nobody_in(
    sshd: tuple[StockSshd, Cluster], make_cluster: MakeCluster
) -> None:
    server, common = sshd
    common.run("init", "seed")
    for number, options in enumerate(
        ("--user alice --role god", "--user ../x", "--user alice --dots a,,b", "--dots a/b/c")
    ):
        client = make_cluster(f"client{number}")
        server.authorize(client.user_key, options)
        done = ask_sshd(server, client, "dm serve --stdio")
        assert done.exit_status == 2 and done.stdout == b"", options
