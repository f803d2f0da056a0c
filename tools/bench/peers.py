"""The programs that are compared, each doing its usual thing on a directory of its own."""

import os
import re
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from tests.support.cluster import Cluster
from tests.support.proxy import Proxy
from tests.support.sshd import StockSshd

TIMEOUT_S = 1200.0


class Cost(NamedTuple):
    """Wall time of one command, and what it stored (growth) or sent (both directions)."""

    seconds: float
    size: int


class Store(Protocol):
    """A program that keeps versions of a directory."""

    name: str

    def version(self) -> str:
        """What the program calls itself."""
        ...

    def commit(self, source: Path) -> Cost:
        """Store `source` as it is now; the first call makes the store."""
        ...


class Sender(Protocol):
    """A program that brings another place up to date."""

    name: str

    def send(self, source: Path) -> Cost:
        """Bring the other side to `source`'s state."""
        ...


def apparent_bytes(directory: Path) -> int:
    """What `du --apparent-size` says; 0 when there is nothing."""
    if not directory.exists():
        return 0
    counted = run(["du", "--apparent-size", "--block-size=1", "--summarize", str(directory)])
    return int(counted.split()[0])


def run(command: list[str], environment: Mapping[str, str] | None = None) -> str:
    """Standard output of a command that must succeed."""
    done = subprocess.run(
        command,
        env={**os.environ, **(environment or {})},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=TIMEOUT_S,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{command}: {done.returncode}\n{done.stdout}{done.stderr}")
    return done.stdout


def timed(command: list[str], store: Path, environment: Mapping[str, str] | None = None) -> Cost:
    """Run a command and say what it took and by how much it made `store` grow."""
    before = apparent_bytes(store)
    started = time.perf_counter()
    run(command, environment)
    seconds = time.perf_counter() - started
    return Cost(seconds, apparent_bytes(store) - before)


class Dm:
    """This project: a store with `source` attached, and a server to push to."""

    name = "dm"

    def __init__(self, directory: Path) -> None:
        self.near = Cluster(directory / "near", "near")
        self.far = Cluster(directory / "far", "far")
        self.proxy = Proxy(self.far.serve().port)
        self.near.add_remote("far", self.far, port=self.proxy.port)
        self._attached = False

    def version(self) -> str:
        return "dm " + self.near.run("version").stdout.split()[-1]

    def commit(self, source: Path) -> Cost:
        if not self._attached:
            self.near.run("init", "bench", "--at", source)
            self._attached = True
        command = [*self.near.program, "commit", "-q", "-m", "bench"]
        return timed(command, self.near.home, self.near.environment)

    def send(self, source: Path) -> Cost:
        """Push what was committed last."""
        before = self.proxy.bytes_total
        started = time.perf_counter()
        self.near.run("push", "-q", "far", timeout_s=TIMEOUT_S)
        return Cost(time.perf_counter() - started, self.proxy.bytes_total - before)

    def close(self) -> None:
        """End the server and the proxy."""
        self.proxy.close()
        self.near.close()
        self.far.close()


class Restic:
    """restic with its default compression; it always encrypts."""

    name = "restic"

    def __init__(self, directory: Path) -> None:
        self._repository = directory / "restic"
        self._environment = {
            "RESTIC_REPOSITORY": str(self._repository),
            "RESTIC_PASSWORD": "bench",
            "RESTIC_CACHE_DIR": str(directory / "restic-cache"),
        }
        run(["restic", "init", "-q"], self._environment)

    def version(self) -> str:
        return " ".join(run(["restic", "version"]).split()[:2])

    def commit(self, source: Path) -> Cost:
        return timed(["restic", "backup", "-q", str(source)], self._repository, self._environment)


class Borg:
    """borg without encryption, zstd level 3."""

    name = "borg"

    def __init__(self, directory: Path) -> None:
        self._repository = directory / "borg"
        self._environment = {
            "BORG_REPO": str(self._repository),
            "BORG_BASE_DIR": str(directory / "borg-base"),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }
        self._archives = 0
        run(["borg", "init", "-e", "none"], self._environment)

    def version(self) -> str:
        return run(["borg", "--version"]).strip()

    def commit(self, source: Path) -> Cost:
        self._archives += 1
        command = ["borg", "create", "--compression", "zstd,3", f"::v{self._archives}", str(source)]
        return timed(command, self._repository, self._environment)


class Git:
    """git with its repository beside the directory; it keeps neither owners nor times."""

    name = "git"

    def __init__(self, directory: Path) -> None:
        self._repository = directory / "git"
        identity = {
            f"GIT_{who}_{what}": "bench"
            for who in ("AUTHOR", "COMMITTER")
            for what in ("NAME", "EMAIL")
        }
        self._environment = {
            **identity,
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_DIR": str(self._repository),
        }
        run(
            ["git", "init", "-q", "--bare", str(self._repository)],
            {"GIT_CONFIG_GLOBAL": "/dev/null"},
        )

    def version(self) -> str:
        return run(["git", "--version"]).strip().replace(" version", "")

    def commit(self, source: Path) -> Cost:
        script = (
            'git --work-tree="$0" add -A && git --work-tree="$0" commit -q --allow-empty -m bench'
        )
        return timed(["sh", "-c", script, str(source)], self._repository, self._environment)


class Rsync:
    """rsync -az over OpenSSH on the loopback, into a directory of its own."""

    name = "rsync"

    def __init__(self, directory: Path, key_of: Cluster) -> None:
        self._target = directory / "rsync"
        self._sshd = StockSshd(directory / "sshd", key_of)
        self._sshd.authorize(key_of.user_key, command="eval $SSH_ORIGINAL_COMMAND")
        self.proxy = Proxy(self._sshd.port)
        self._shell = (
            f"ssh -p {self.proxy.port} -i {key_of.user_key.private} -F /dev/null"
            " -o IdentitiesOnly=yes -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null"
        )

    def version(self) -> str:
        found = re.search(r"version (\S+)", run(["rsync", "--version"]))
        assert found is not None, "rsync tells its version"
        return f"rsync {found[1]}"

    def send(self, source: Path) -> Cost:
        before = self.proxy.bytes_total
        target = f"{self._sshd.user}@127.0.0.1:{self._target}/"
        started = time.perf_counter()
        run(["rsync", "-az", "--delete", "-e", self._shell, f"{source}/", target])
        return Cost(time.perf_counter() - started, self.proxy.bytes_total - before)

    def close(self) -> None:
        """End the server and the proxy."""
        self.proxy.close()
        self._sshd.close()
