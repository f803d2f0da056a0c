"""Bad input from users, disks and peers: a named error, the contract's exit code, nothing changed."""

import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.cluster import Cluster, MakeCluster, Result
from tests.support.keys import make_key
from tests.support.tree import describe_tree

SMALL_DISK_BYTES = 32 * 1024 * 1024


@pytest.fixture
def apples(cluster: Cluster) -> Cluster:
    """A cluster with the dot `apples` and one commit."""
    cluster.init("apples", {"HELLO": "world"})
    cluster.commit("hello")
    return cluster


def state(cluster: Cluster) -> tuple[object, ...]:
    """All that a refused command must leave as it was."""
    return (
        cluster.dots(),
        cluster.run("branch", "--dot", "apples").stdout,
        cluster.run("log", "--dot", "apples").stdout,
        cluster.run("remote", "-v").stdout,
        describe_tree(cluster.tree("apples")),
    )


def assert_refused(
    cluster: Cluster, *command: str, code: int, error: str | tuple[str, ...]
) -> Result:
    """The command fails with `code` and an error object named `error`, and changes nothing."""
    before = state(cluster)
    result = cluster.run("--json", *command, check=False)
    assert result.code == code, result.describe()
    names = (error,) if isinstance(error, str) else error
    assert result.error()["code"] in names, result.describe()
    assert "Traceback" not in result.stderr
    assert state(cluster) == before
    return result


# --- names and revisions ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", ".", "..", "a b", "a\nb", "-x", "x" * 65, "é", "a:b", "\x1b[31m"]
)
def test_bad_dot_names(apples: Cluster, name: str) -> None:
    result = assert_refused(apples, "init", "--", name, code=2, error=("invalid-name", "usage"))
    assert "\x1b" not in result.stderr


@pytest.mark.parametrize("name", ["", "..", "a/b", "a b", "x" * 65, "-x", "HEAD", "@"])
def test_bad_branch_names(apples: Cluster, name: str) -> None:
    names = ("invalid-name", "usage")
    assert_refused(apples, "checkout", "-b", "--", name, code=2, error=names)


@pytest.mark.parametrize(
    "revision", ["nope", "HEAD^^^", "HEAD~99", "deadbeef", "master@{99}", "far/master", "v9"]
)
def test_unknown_revisions(apples: Cluster, revision: str) -> None:
    not_found = ("no-revision", "not-found", "no-remote")
    for command in (["show"], ["log"], ["reset", "--hard"], ["branch", "new"]):
        assert_refused(apples, *command, revision, code=10, error=not_found)


def test_unknown_things(apples: Cluster) -> None:
    for command in (
        ["switch", "pears"],
        ["dot", "delete", "-f", "pears"],
        ["dot", "path", "pears"],
        ["checkout", "pears"],
        ["branch", "-d", "pears"],
        ["push", "nowhere"],
        ["pull", "nowhere"],
        ["clone", "nowhere", "apples"],
        ["remote", "rm", "nowhere"],
        ["cat", "HEAD:__default__/nope"],
        ["transfer", "show", "0123456789ab"],
    ):
        result = apples.run(*command, "--json", check=False)
        assert result.code == 10, result.describe()
        assert result.error()["code"].startswith("no"), result.describe()


def test_usage_errors(apples: Cluster) -> None:
    for command in (["commit"], ["nope"], ["init"], ["commit", "-m", "x", "--nope"], ["push"]):
        assert apples.run(*command, check=False).code == 2


def test_no_store_is_not_found(cluster: Cluster) -> None:
    assert cluster.run("log", check=False).code == 10
    assert not cluster.home.exists()


@pytest.mark.parametrize("text", ["", "version = 99", '{"version": 99}', "\x00"])
def test_a_store_of_another_format_is_refused_by_name(apples: Cluster, text: str) -> None:
    format_file = apples.home / "format"
    sound = format_file.read_text()
    format_file.write_text(text)
    for command in (["log"], ["commit", "-m", "x"], ["list"]):
        result = apples.run(*command, "--json", check=False)
        assert result.code not in (0, 70), result.describe()
        assert "Traceback" not in result.stderr
        assert result.error()["code"] in ("format-unsupported", "corruption"), result.describe()
    format_file.write_text(sound)
    assert apples.messages() == ["hello"]


def test_bad_configuration(apples: Cluster, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    for text, mode in (("not toml [", 0o600), ("[nope]\n", 0o600), ("[user]\n", 0o666)):
        config.write_text(text)
        config.chmod(mode)
        result = apples.run("list", "--json", check=False, env={"DM_CONFIG": str(config)})
        assert (result.code, result.error()["code"]) == (2, "config"), result.describe()


# --- remotes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "ssh://",
        "ssh://-oProxyCommand=touch${IFS}pwned/x",
        "-oProxyCommand=touch${IFS}pwned",
        "ssh://user@host:notaport/",
        "ssh://user@host:99999/",
        "ssh://us er@host/",
        "ssh://user@host\n/",
        "http://host/",
        "ext::sh -c touch% pwned",
    ],
)
def test_hostile_urls(apples: Cluster, url: str) -> None:
    """No URL is an option or a command of anything."""
    names = ("usage", "invalid-name", "config")
    assert_refused(apples, "remote", "add", "--", "evil", url, code=2, error=names)
    assert not list(apples.directory.rglob("pwned"))


def test_nobody_listens(apples: Cluster) -> None:
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    apples.run("remote", "add", "far", f"ssh://dm@127.0.0.1:{port}", check=False)
    assert_refused(apples, "push", "far", code=13, error="network")


@pytest.fixture
def http_server() -> Iterator[int]:
    """A port where something answers that is no SSH server."""
    listener = socket.create_server(("127.0.0.1", 0))

    def answer() -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            with client:
                client.sendall(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" * 100)

    threading.Thread(target=answer, daemon=True).start()
    yield listener.getsockname()[1]
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def test_a_remote_that_is_no_ssh_server(apples: Cluster, http_server: int) -> None:
    apples.run("remote", "add", "far", f"ssh://dm@127.0.0.1:{http_server}", check=False)
    errors = ("network", "not-a-dm-server", "protocol")
    assert_refused(apples, "push", "far", code=13, error=errors)


def test_an_unknown_host_key_is_refused_without_a_terminal(make_cluster: MakeCluster) -> None:
    near, far = make_cluster("near"), make_cluster("far")
    near.init("apples", {"HELLO": "world"})
    near.commit("hello")
    server = far.serve()
    server.authorize(near.user_key, role="admin")
    near.run("remote", "add", "far", server.url("dm"), check=False)
    assert near.run("push", "far", check=False).code in (10, 12)
    assert far.run("list", "-H", check=False).stdout == ""


def test_a_changed_host_key_is_refused(pair: tuple[Cluster, Cluster]) -> None:
    """Somebody in the middle: not one byte of the dot is sent."""
    near, far = pair
    near.init("apples", {"HELLO": "world"})
    near.commit("hello")
    server = far.serve()
    server.kill()
    server.host_key = make_key(far.directory / "other_host_key", "somebody else")
    server.restart()
    assert_refused(near, "push", "far", code=12, error="host-key")
    assert far.dots() == []


def test_a_key_that_is_not_authorised(make_cluster: MakeCluster) -> None:
    near, far = make_cluster("near"), make_cluster("far")
    near.init("apples", {"HELLO": "world"})
    near.commit("hello")
    server = far.serve()
    near.trust(server, server.port)
    near.run("remote", "add", "far", server.url("dm"), check=False)
    assert_refused(near, "push", "far", code=12, error="denied")


# --- hostile peers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mode", "codes", "errors"),
    [
        ("flip", (13, 16), ("hash-mismatch", "bad-object", "corruption", "protocol")),
        ("truncate", (13, 16), ("protocol", "network", "bad-object", "hash-mismatch")),
        ("oversize", (13,), ("protocol",)),
        ("garbage", (13,), ("protocol",)),
    ],
)
def test_a_server_that_sends_damaged_frames(
    pair: tuple[Cluster, Cluster], mode: str, codes: tuple[int, ...], errors: tuple[str, ...]
) -> None:
    """Nothing of a bad transfer can be seen afterwards, and a good one then works."""
    near, far = pair
    far.init("apples", {"HELLO": "world", "large": os.urandom(3_000_000)})
    far.commit("hello")
    near.run("clone", "far", "apples")
    far.write("apples", {"large": os.urandom(3_000_000)})
    far.commit("from far")
    serve_hostile(far, mode)
    for command in (["fetch", "far"], ["pull", "far"]):
        before = state(near)
        result = near.run(*command, "--json", check=False)
        assert result.code in codes, result.describe()
        assert result.error()["code"] in errors, result.describe()
        assert state(near) == before
        near.run("fsck", "--full")
    serve_honest(far)
    near.run("pull", "far")
    assert describe_tree(near.tree("apples")) == describe_tree(far.tree("apples"))


@pytest.mark.parametrize("mode", ["flip", "truncate", "oversize", "garbage"])
def test_a_client_that_sends_damaged_frames(pair: tuple[Cluster, Cluster], mode: str) -> None:
    near, far = pair
    near.init("apples", {"HELLO": "world", "large": os.urandom(3_000_000)})
    near.commit("hello")
    near.run("push", "far")
    far.run("switch", "apples")
    before = state(far)
    near.commit("again")
    near.write("apples", {"large": os.urandom(3_000_000)})
    near.commit("large")
    near.turn_hostile(mode)
    assert near.run("push", "far", check=False).code not in (0, 70)
    assert state(far) == before
    far.run("fsck", "--full")
    near.turn_honest()
    near.run("push", "far")
    assert describe_tree(near.tree("apples")) == describe_tree(far.tree("apples"))


@pytest.mark.parametrize("mode", ["dotdot", "slash"])
def test_a_server_whose_pages_name_paths_outside_the_tree(
    pair: tuple[Cluster, Cluster], mode: str
) -> None:
    """Refused as a bad object; no file appears, inside the tree or out of it."""
    near, far = pair
    far.init("apples", {"trap/HELLO": "world"})
    far.commit("honest")
    near.run("clone", "far", "apples")
    far.turn_hostile(mode)
    far.write("apples", {f"trap2/{mode}": "escaped"})
    far.commit("hostile")
    serve_hostile(far, mode)
    outside = set(near.directory.rglob("*"))
    for command in (["fetch", "far"], ["pull", "far"]):
        assert_refused(near, *command, code=16, error="bad-object")
    assert not [path for path in set(near.directory.rglob("*")) - outside if mode in path.name]
    near.run("fsck", "--full")


def serve_hostile(cluster: Cluster, mode: str) -> None:
    """Restart the server with one rule broken."""
    assert cluster.server is not None
    cluster.server.kill()
    cluster.turn_hostile(mode)
    cluster.server.restart()


def serve_honest(cluster: Cluster) -> None:
    """Restart the server as what it should be."""
    assert cluster.server is not None
    cluster.server.kill()
    cluster.turn_honest()
    cluster.server.restart()


# --- disks ---------------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(cluster: Cluster) -> Iterator[Cluster]:
    """A cluster whose store lies on a disk of 32 MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    cluster.home.mkdir(mode=0o700)
    options = f"size={SMALL_DISK_BYTES},mode=0700"
    mount = ["mount", "-t", "tmpfs", "-o", options, "dmsync-test", str(cluster.home)]
    mounted = subprocess.run(mount, capture_output=True, text=True)
    if mounted.returncode != 0:
        pytest.skip(f"a tmpfs cannot be mounted here: {mounted.stderr}")
    yield cluster
    subprocess.run(["umount", "--lazy", cluster.home], check=True)


def test_a_full_disk_refuses_a_commit_and_loses_nothing(
    small_disk: Cluster, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "HELLO").write_text("world")
    small_disk.run("init", "apples", "--at", data)
    small_disk.commit("hello")
    (data / "large").write_bytes(os.urandom(2 * SMALL_DISK_BYTES))
    assert_refused(small_disk, "commit", "-m", "large", code=1, error="no-space")
    (data / "large").unlink()
    (data / "HELLO").write_text("still working")
    small_disk.commit("after")
    assert small_disk.messages() == ["hello", "after"]
    small_disk.run("fsck", "--full")


def test_a_full_disk_refuses_a_clone_and_loses_nothing(
    small_disk: Cluster, make_cluster: MakeCluster
) -> None:
    far = make_cluster("far")
    far.init("large", {"large": os.urandom(2 * SMALL_DISK_BYTES)})
    far.commit("large")
    small_disk.init("apples", {"HELLO": "world"})
    small_disk.commit("hello")
    small_disk.add_remote("far", far)
    assert_refused(small_disk, "clone", "far", "large", code=1, error="no-space")
    small_disk.run("fsck", "--full")
