"""Programs that keep versions of a directory, each doing its usual thing in a store of its own."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, Protocol

from tests.support.cluster import Cluster
from tools.benchmarks.measuring import Cost, apparent_bytes, measured, measured_exactly, run

MESSAGE: Final = "bench"


class Store(Protocol):
    """A program with an empty store for the versions of one directory."""

    name: str

    def commit(self, source: Path) -> Cost:
        """Store `source` as it is now; `stored_bytes` is by how much the store grew."""
        ...

    def versions_count(self) -> int:
        """How many versions it says it has."""
        ...


class Restorer(Store, Protocol):
    """A store that is asked for its newest version."""

    def restore(self, target: Path) -> tuple[Cost, Path]:
        """Write the newest version below `target`, which is not there; where its root is then."""
        ...


def checked_commit(store: Store, source: Path) -> Cost:
    """Commit and make sure that there is one version more."""
    before = store.versions_count()
    cost = store.commit(source)
    if store.versions_count() != before + 1:
        raise RuntimeError(f"{store.name} did not store a version of {source}")
    return cost


def stages_of(document: Mapping[str, Any]) -> dict[str, float]:
    """Wall seconds by stage from the summary of a dm command; empty when it tells none."""
    found = document.get("stages") or {}
    return {
        name: float(value["seconds"] if isinstance(value, dict) else value)
        for name, value in found.items()
    }


class Dm:
    """This project: a cluster whose current dot is the directory committed first."""

    name = "dm"
    dot = "bench"

    def __init__(self, directory: Path) -> None:
        self.cluster = Cluster(directory / "dm", "bench")
        self._versions = 0
        self._attached = False

    def attach(self, source: Path) -> None:
        """Make the directory a dot, once."""
        if not self._attached:
            self.cluster.run("init", self.dot, "--at", source)
            self._attached = True

    def measure(self, *arguments: str | Path) -> tuple[Cost, dict[str, Any]]:
        """Run `dm --json`; its cost with stages, and its summary."""
        words = [*self.cluster.program, *(str(word) for word in arguments), "--json"]
        cost, output = measured_exactly(words, self.cluster.environment)
        lines = [line for line in output.splitlines() if line.startswith("{")]
        summary: dict[str, Any] = json.loads(lines[-1]) if lines else {}
        return replace(cost, stages=stages_of(summary)), summary

    def commit(self, source: Path) -> Cost:
        self.attach(source)
        before = apparent_bytes(self.cluster.home)
        cost, _ = self.measure("commit", "-m", MESSAGE)
        return cost.with_more(stored_bytes=apparent_bytes(self.cluster.home) - before)

    def versions_count(self) -> int:
        if not self._attached:
            return 0
        log: list[object] = self.cluster.run("log", "--json").json()
        return len(log)

    def restore(self, target: Path) -> tuple[Cost, Path]:
        cost, _ = self.measure("export", "HEAD:__default__", target)
        return cost, target

    def close(self) -> None:
        """End the server, if one runs."""
        self.cluster.close()


class Restic:
    """restic as it comes: it compresses little and always encrypts."""

    name = "restic"

    def __init__(self, directory: Path) -> None:
        self._repository = directory / "restic"
        self._source = Path("/")
        self._environment = {
            "RESTIC_REPOSITORY": str(self._repository),
            "RESTIC_PASSWORD": "bench",
            "RESTIC_CACHE_DIR": str(directory / "restic-cache"),
        }
        measured(["restic", "init", "-q"], self._environment)

    def commit(self, source: Path) -> Cost:
        self._source = source
        before = apparent_bytes(self._repository)
        cost, _ = measured(["restic", "backup", "-q", str(source)], self._environment)
        return cost.with_more(stored_bytes=apparent_bytes(self._repository) - before)

    def versions_count(self) -> int:
        return len(list((self._repository / "snapshots").iterdir()))

    def restore(self, target: Path) -> tuple[Cost, Path]:
        command = ["restic", "restore", "-q", "latest", "--target", str(target)]
        cost, _ = measured(command, self._environment)
        return cost, target / self._source.relative_to("/")


class Borg:
    """borg without encryption, and its default compression, lz4."""

    name = "borg"

    def __init__(self, directory: Path) -> None:
        self._repository = directory / "borg"
        self._environment = {
            "BORG_REPO": str(self._repository),
            "BORG_BASE_DIR": str(directory / "borg-base"),
            "BORG_UNKNOWN_UNENCRYPTED_REPO_ACCESS_IS_OK": "yes",
        }
        self._archives = 0
        measured(["borg", "init", "-e", "none"], self._environment)

    def commit(self, source: Path) -> Cost:
        self._archives += 1
        before = apparent_bytes(self._repository)
        command = ["borg", "create", f"::v{self._archives}", str(source)]
        cost, _ = measured(command, self._environment)
        return cost.with_more(stored_bytes=apparent_bytes(self._repository) - before)

    def versions_count(self) -> int:
        _, output = measured(["borg", "list", "--short"], self._environment)
        return len(output.split())


class Git:
    """git with its repository beside the directory; it keeps neither owners nor times."""

    name = "git"

    def __init__(self, directory: Path) -> None:
        self._repository = directory / "git"
        self._environment = {
            **{
                f"GIT_{who}_{what}": "bench"
                for who in ("AUTHOR", "COMMITTER")
                for what in ("NAME", "EMAIL")
            },
            "GIT_CONFIG_GLOBAL": "/dev/null",
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_DIR": str(self._repository),
        }
        measured(["git", "init", "-q", "--bare", str(self._repository)], self._environment)

    def commit(self, source: Path) -> Cost:
        script = (
            'git --work-tree="$0" add -A && git --work-tree="$0" commit -q --allow-empty -m bench'
        )
        before = apparent_bytes(self._repository)
        cost, _ = measured(["sh", "-c", script, str(source)], self._environment)
        return cost.with_more(stored_bytes=apparent_bytes(self._repository) - before)

    def status(self, source: Path) -> Cost:
        """`git status` of a directory without changes."""
        command = ["git", f"--work-tree={source}", "status", "--porcelain"]
        cost, output = measured(command, self._environment)
        if output:
            raise RuntimeError(f"git finds changes: {output[:200]}")
        return cost

    def versions_count(self) -> int:
        _, output = measured(["git", "rev-list", "--all", "--count"], self._environment)
        return int(output)


class Bup:
    """bup: an index, then a save."""

    name = "bup"

    def __init__(self, directory: Path) -> None:
        self._repository = directory / "bup"
        self._environment = {"BUP_DIR": str(self._repository), "HOME": str(directory)}
        measured(["bup", "init"], self._environment)

    def commit(self, source: Path) -> Cost:
        script = 'bup index "$0" && bup save -q -n bench "$0"'
        before = apparent_bytes(self._repository)
        cost, _ = measured(["sh", "-c", script, str(source)], self._environment)
        return cost.with_more(stored_bytes=apparent_bytes(self._repository) - before)

    def versions_count(self) -> int:
        command = ["git", f"--git-dir={self._repository}", "rev-list", "--all", "--count"]
        return int(run(command))


def tar_zstd(source: Path, target: Path, threads: int = 2) -> Cost:
    """`tar | zstd -3` of a directory into a file: what reading, compressing and writing cost."""
    script = 'tar -C "$0" -c . | zstd -q -3 -T"$2" -f -o "$1"'
    cost, _ = measured(["sh", "-c", script, str(source), str(target), str(threads)])
    cost = cost.with_more(stored_bytes=target.stat().st_size)
    target.unlink()
    return cost
