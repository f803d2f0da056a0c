"""Programs that bring another machine up to date over SSH on the loopback."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from tests.support.cluster import Cluster
from tests.support.keys import known_hosts_line
from tests.support.sshd import StockSshd
from tools.benchmarks.measuring import Cost, measured
from tools.benchmarks.peers import Dm

SSH_OPTIONS: Final = (
    "-F", "/dev/null", "-o", "IdentitiesOnly=yes", "-o", "StrictHostKeyChecking=no",
    "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
)  # fmt: skip


class OwnServer:
    """A fresh store behind `dm serve --listen`."""

    name = "own server"

    def __init__(self, directory: Path) -> None:
        self.cluster = Cluster(directory, "far")
        self.port = self.cluster.serve().port

    def admit(self, client: Cluster, remote: str, port: int | None = None) -> None:
        """Let a client in and name this store there; `port` is a link's before it."""
        client.add_remote(remote, self.cluster, port=port)

    def close(self) -> None:
        """End the server."""
        self.cluster.close()


class SshdServer:
    """A fresh store behind the stock sshd, which runs `dm serve --stdio`."""

    name = "stock sshd"

    def __init__(self, directory: Path) -> None:
        self.cluster = Cluster(directory, "far")
        self._sshd = StockSshd(directory / "sshd", self.cluster)
        self.port = self._sshd.port

    def admit(self, client: Cluster, remote: str, port: int | None = None) -> None:
        """Let a client in and name this store there."""
        self._sshd.authorize(client.user_key)
        with client.known_hosts.open("a") as file:
            file.write(known_hosts_line(port or self.port, self._sshd.host_key.public))
        client.run(
            "remote", "add", remote, f"ssh://{self._sshd.user}@127.0.0.1:{port or self.port}"
        )

    def close(self) -> None:
        """End the server."""
        self._sshd.close()
        self.cluster.close()


Server = OwnServer | SshdServer


class Rsync:
    """rsync over OpenSSH as it comes, to and from a directory behind the stock sshd."""

    name = "rsync"

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._client = Cluster(directory / "client", "rsync")
        self._sshd = StockSshd(directory / "sshd", self._client)
        self._sshd.authorize(self._client.user_key, command="eval $SSH_ORIGINAL_COMMAND")
        self.port = self._sshd.port

    def send(self, source: Path, target: Path, *options: str, port: int | None = None) -> Cost:
        """`rsync -a OPTIONS` of a directory to another; `port` is a link's before the server."""
        return self._copy([f"{source}/", self._there(target)], options, port)

    def receive(self, source: Path, target: Path, *options: str, port: int | None = None) -> Cost:
        """The same the other way."""
        return self._copy([self._there(source), f"{target}/"], options, port)

    def _there(self, directory: Path) -> str:
        return f"{self._sshd.user}@127.0.0.1:{directory}/"

    def _copy(self, ends: Sequence[str], options: Sequence[str], port: int | None) -> Cost:
        key = str(self._client.user_key.private)
        shell = shlex.join(["ssh", "-p", str(port or self.port), "-i", key, *SSH_OPTIONS])
        cost, _ = measured(["rsync", "-a", "--delete", *options, "-e", shell, *ends])
        return cost

    def close(self) -> None:
        """End the server."""
        self._sshd.close()
        self._client.close()


def push(dm: Dm, remote: str, *options: str) -> Cost:
    """`dm push` of the current branch, with what the summary says of traffic."""
    cost, summary = dm.measure("push", remote, *options)
    return cost.with_more(**_traffic(summary))


def pull(dm: Dm, remote: str) -> Cost:
    """`dm pull` of the current branch."""
    cost, summary = dm.measure("pull", remote)
    return cost.with_more(**_traffic(summary))


def clone(dm: Dm, remote: str, tree: Path | None = None) -> Cost:
    """`dm clone` of the dot that others pushed, its files written to `tree`, if given."""
    place = () if tree is None else ("--at", tree)
    cost, summary = dm.measure("clone", remote, Dm.dot, *place)
    return cost.with_more(**_traffic(summary))


def _traffic(summary: dict[str, object]) -> dict[str, float]:
    """Round trips and bytes of a transfer's summary; one that holds several dots is not ours."""
    names = ("round_trips", "bytes_sent", "bytes_received", "commits_sent", "reencoded")
    found = {name: summary[name] for name in names if name in summary}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}
