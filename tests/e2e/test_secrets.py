"""Secrets stay where they are: canaries are planted, everything that dm leaves is searched.

Looked at: arguments and environment of every process that dm starts, what it prints at its most
talkative, crash logs, and every byte of the stores, packs and event logs included. Files of a
store are their owner's alone, whatever the umask.
"""

import os
import shutil
import stat
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dmsync.surfaces.cli.crash_log import write_crash_log
from tests.support.cluster import DM, MakeCluster, has_command
from tests.support.processes import Daemon

PASSPHRASE = "canary-of-the-passphrase"
PASSWORD = "canary-of-the-url"
TALKATIVE = ("-vv", "--profile")


def holds(directory: Path, canary: bytes) -> list[str]:
    """Files below a directory that hold the bytes."""
    return [
        str(path)
        for path in directory.rglob("*")
        if path.is_file() and not path.is_symlink() and canary in path.read_bytes()
    ]


class Watch:
    """Reads arguments and environment of every process below this one, over and over."""

    def __init__(self, *canaries: str) -> None:
        self._canaries = [canary.encode() for canary in canaries]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.seen: set[str] = set()
        self.programs: set[str] = set()

    def __enter__(self) -> "Watch":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._stop.is_set():
            for pid in _descendants(os.getpid()):
                for what in ("cmdline", "environ"):
                    self._read(pid, what)
            time.sleep(0.005)

    def _read(self, pid: int, what: str) -> None:
        try:
            text = Path(f"/proc/{pid}/{what}").read_bytes()
        except OSError:
            return
        if what == "cmdline":
            self.programs.add(text.partition(b"\0")[0].decode(errors="replace").rpartition("/")[2])
        self.seen |= {f"{what}: {c.decode()}" for c in self._canaries if c in text}


def _descendants(parent: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                fields = Path(f"/proc/{name}/stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            parents.setdefault(int(fields[1]), []).append(int(name))
    found, queue = [], [parent]
    while queue:
        children = parents.get(queue.pop(), [])
        found += children
        queue += children
    return found


def test_the_watch_sees_what_stands_in_arguments_and_environments() -> None:
    """The control: a child that does what must not be done is caught."""
    with Watch("canary-of-the-control") as watch:
        subprocess.run(["sleep", "0.3"], env={"SECRET": "canary-of-the-control"}, check=True)
        subprocess.run(["sh", "-c", "sleep 0.3 # canary-of-the-control"], check=True)
    assert watch.seen == {
        "cmdline: canary-of-the-control",
        "environ: canary-of-the-control",
    }


@pytest.fixture
def agent(tmp_path: Path) -> Iterator[str]:
    """The socket of an ssh-agent."""
    if not (has_command("ssh-agent") and has_command("ssh-add")):
        pytest.skip("no ssh-agent here")
    socket = tmp_path / "agent"
    daemon = Daemon(["ssh-agent", "-D", "-a", socket], log=tmp_path / "agent.log")
    deadline_s = time.monotonic() + 10
    while not socket.exists() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    yield str(socket)
    daemon.kill()


def encrypted_key(path: Path) -> tuple[str, str]:
    """A key with a passphrase: its public line, and a line of what its file holds."""
    keygen = ["ssh-keygen", "-q", "-f", str(path), "-C", "canary"]
    subprocess.run([*keygen, "-t", "ed25519", "-N", ""], check=True)
    plain = path.read_text().splitlines()[2]
    subprocess.run([*keygen, "-p", "-P", "", "-N", PASSPHRASE], check=True, capture_output=True)
    return Path(f"{path}.pub").read_text().strip(), plain


def load(agent: str, key: Path, directory: Path) -> None:
    """Give a key to the agent, its passphrase through a program that asks for it."""
    ask = directory / "ask"
    ask.write_text(f"#!/bin/sh\necho {PASSPHRASE}\n")
    ask.chmod(0o700)
    environment = {
        "SSH_AUTH_SOCK": agent,
        "SSH_ASKPASS": str(ask),
        "SSH_ASKPASS_REQUIRE": "force",
        "DISPLAY": ":0",
        "PATH": os.environ["PATH"],
    }
    subprocess.run(
        ["ssh-add", "-q", key],
        env=environment,
        stdin=subprocess.DEVNULL,
        start_new_session=True,
        check=True,
        capture_output=True,
    )
    ask.unlink()


@pytest.mark.parametrize("way", ["built-in", "command"])
def test_a_passphrase_and_a_private_key_are_nowhere(
    way: str, make_cluster: MakeCluster, agent: str, tmp_path: Path
) -> None:
    """Pushed, signed and pulled with keys that have passphrases, with hooks and the most talk."""
    if way == "command" and not has_command("ssh"):
        pytest.skip("no ssh here")
    vault, client = make_cluster("vault"), make_cluster("client")
    key = tmp_path / "key"
    public, plain = encrypted_key(key)
    load(agent, key, tmp_path)
    server = vault.serve()
    with server.authorized_keys.open("a") as file:
        file.write(f'dm-user="client" {public}\n')
    client.trust(server, server.port)
    client.environment |= {"DM_SSH_KEY": str(key), "SSH_AUTH_SOCK": agent}
    if way == "command":
        client.environment["DM_SSH_COMMAND"] = (
            f"ssh -F none -o UserKnownHostsFile={client.known_hosts} -i {key}.pub"
        )
    client.config.write_text(
        f'[user]\nsigning-key = "{key}.pub"\n[dot.app.hooks]\nquiesce = "sleep 0.1"\n'
    )
    client.config.chmod(0o600)
    client.environment["DM_CONFIG"] = str(client.config)
    canaries = (PASSPHRASE, plain, PASSWORD)
    with Watch(*canaries) as watch:
        client.init("app", {"a": "1"})
        said = [client.run("commit", "-m", "signed", "-S", *TALKATIVE)]
        said.append(client.run("remote", "add", "vault", server.url("client"), *TALKATIVE))
        said.append(client.run("push", "vault", *TALKATIVE))
        said.append(client.run("pull", "vault", *TALKATIVE))
        url = f"ssh://client:{PASSWORD}@127.0.0.1:{server.port}"
        for words in (("remote", "add", "bad", url), ("push", url), ("clone", url, "app")):
            result = client.run(*words, *TALKATIVE, check=False)
            assert result.code == 2, result.describe()
            said.append(result)
    # the last three have the password in their own arguments, where the user wrote it
    assert watch.seen <= {f"cmdline: {PASSWORD}"}
    assert "sleep" in watch.programs or way == "command", "a hook ran and was looked at"
    assert way == "built-in" or "ssh" in watch.programs
    for canary in canaries:
        for result in said:
            assert canary not in result.stdout + result.stderr
        for directory in (vault.home, client.home):
            assert holds(directory, canary.encode()) == []
        assert canary not in (vault.directory / "serve.log").read_text()


def test_a_password_in_a_url_is_refused_and_never_repeated(make_cluster: MakeCluster) -> None:
    client = make_cluster("client")
    client.run("init", "app")
    for url in (
        f"ssh://u:{PASSWORD}@host/path",
        f"u:{PASSWORD}@host",
        f"ssh://u:a@b{PASSWORD}@host",
        f"ssh://u:a/{PASSWORD}@host:22",
    ):
        for words in (("remote", "add", "x", url), ("fetch", url), ("push", url, "--json")):
            result = client.refused(*words, code=2)
            assert PASSWORD not in result.stdout + result.stderr, result.describe()
    client.config.write_text(f'[remote.x]\nurl = "ssh://u:{PASSWORD}@host"\n')
    client.config.chmod(0o600)
    for words in (("remote", "-v"), ("push", "x"), ("remote", "--json")):
        result = client.run(*words, env={"DM_CONFIG": str(client.config)}, check=False)
        assert result.code == 2 and PASSWORD not in result.stdout + result.stderr
    assert holds(client.home, PASSWORD.encode()) == []


def test_a_crash_log_holds_no_password_and_is_private(
    make_cluster: MakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = make_cluster("client")
    client.run("init", "app")
    old = os.umask(0)
    try:
        url = f"ssh://u:{PASSWORD}@host"
        try:
            raise ValueError(f"cannot use '{url}' at all")
        except ValueError as exc:
            path = write_crash_log(exc, ["push", url], str(client.home))
    finally:
        os.umask(old)
    assert path == str(client.home / "crash.log")
    text = Path(path).read_text()
    assert "ValueError" in text and PASSWORD not in text
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_what_a_store_holds_is_its_owners_alone(
    umask: int, make_cluster: MakeCluster, tmp_path: Path
) -> None:
    """Only working trees have the modes that their files were given."""
    old = os.umask(umask)
    try:
        vault, client = make_cluster("vault"), make_cluster("client")
        client.add_remote("vault", vault, user="client")
        client.init("app", {"a": "1"})
        client.commit("one")
        client.run("push", "vault")
        client.run("checkout", "-b", "topic")
        client.run("reset", "--hard", "HEAD")
        client.run("fsck", "--full")
    finally:
        os.umask(old)
    wide = [
        f"{path.relative_to(cluster.directory)} {stat.S_IMODE(path.lstat().st_mode):o}"
        for cluster in (vault, client)
        for path in (cluster.home, *cluster.home.rglob("*"))
        if "trees" not in path.relative_to(cluster.home).parts[2:]
        and not path.is_symlink()
        and path.lstat().st_mode & 0o077
    ]
    assert wide == []


def test_files_that_must_be_private_are_refused_when_they_are_not(
    make_cluster: MakeCluster, tmp_path: Path
) -> None:
    """Configuration names commands, key files let in: others may not write them, or read keys."""
    vault = make_cluster("vault")
    vault.run("init", "app")
    vault.config.write_text("[user]\n")
    vault.config.chmod(0o666)
    vault.refused("list", "--config", vault.config, code=2, saying="written by others")
    host_key = tmp_path / "host"
    shutil.copy(vault.user_key.private, host_key)
    host_key.chmod(0o644)
    keys = tmp_path / "keys"
    keys.touch(mode=0o600)
    served = subprocess.run(
        [
            *(DM, "serve", "--listen", "127.0.0.1:0"),
            *("--host-key", host_key, "--authorized-keys", keys),
        ],
        env=vault.environment,
        capture_output=True,
        timeout=60,
    )
    assert served.returncode == 2 and b"read by others" in served.stderr


def test_a_key_file_that_others_may_write_lets_nobody_in(make_cluster: MakeCluster) -> None:
    vault, client = make_cluster("vault"), make_cluster("client")
    client.add_remote("vault", vault, user="client")
    client.init("app", {"a": "1"})
    client.commit("one")
    vault.serve().authorized_keys.chmod(0o666)
    client.refused("push", "vault", code=12)
    vault.serve().authorized_keys.chmod(0o600)
    client.run("push", "vault")
