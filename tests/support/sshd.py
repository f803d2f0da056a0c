"""A stock OpenSSH server on the loopback, for tests that must not depend on our own."""

import getpass
import socket
from pathlib import Path

from tests.support.cluster import DM, Cluster, has_command
from tests.support.keys import KeyPair, make_key
from tests.support.processes import Daemon, wait_until

SSHD = "/usr/sbin/sshd"
PRIVILEGE_SEPARATION_DIRECTORY = Path("/run/sshd")


def has_sshd() -> bool:
    """Whether the server is installed."""
    return has_command("sshd")


class StockSshd:
    """sshd for the current user; every authorised key may run only `dm serve --stdio` on `cluster`."""

    def __init__(self, directory: Path, cluster: Cluster) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._cluster = cluster
        self.host_key = make_key(directory / "host_key", "sshd")
        self.user = getpass.getuser()
        self._authorized_keys = directory / "authorized_keys"
        self._authorized_keys.touch(mode=0o600)
        self.port = free_port()
        if not PRIVILEGE_SEPARATION_DIRECTORY.exists():
            PRIVILEGE_SEPARATION_DIRECTORY.mkdir(mode=0o755)  # sshd refuses to start without it
        self.daemon = Daemon([SSHD, "-D", "-e", "-f", self._write_config()], log=directory / "log")
        self.daemon.wait_for("Server listening")

    def _write_config(self) -> Path:
        config = self._directory / "sshd_config"
        config.write_text(
            f"Port {self.port}\nListenAddress 127.0.0.1\nHostKey {self.host_key.private}\n"
            f"AuthorizedKeysFile {self._authorized_keys}\nPidFile none\nStrictModes no\n"
            "UsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\n"
        )
        return config

    def authorize(self, key: KeyPair, *options: str, command: str | None = None) -> None:
        """Let `key` run one forced command: `dm serve --stdio` with the cluster's store."""
        forced = command or f"DM_HOME={self._cluster.home} {DM} serve --stdio {' '.join(options)}"
        line = f'restrict,command="{forced.strip()}" {key.public}\n'
        with self._authorized_keys.open("a") as file:
            file.write(line)

    @property
    def url(self) -> str:
        """Where clients find it."""
        return f"ssh://{self.user}@127.0.0.1:{self.port}"

    def close(self) -> None:
        """End the server and wait until its port is free."""
        self.daemon.kill()
        wait_until(lambda: not _answers(self.port), what="sshd's port to close")


def free_port() -> int:
    """A port that nothing listened on a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


def _answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
