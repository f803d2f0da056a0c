"""A store of its own, the installed `dm` working on it, and its SSH server: one side of a test."""

import json
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.support.keys import KeyPair, known_hosts_line, make_key
from tests.support.processes import Daemon

DM = Path(sysconfig.get_path("scripts")) / "dm"
RUN_TIMEOUT_S = 120.0
PEAK_MEMORY_SCRIPT = Path(__file__).with_name("peak_memory.py")
HOSTILE_SCRIPT = Path(__file__).with_name("hostile_dm.py")


@dataclass(frozen=True, slots=True)
class Result:
    """What one run of `dm` left."""

    arguments: tuple[str, ...]
    code: int
    stdout: str
    stderr: str

    def json(self) -> Any:
        """Standard output as one JSON document."""
        return json.loads(self.stdout)

    def summary(self) -> dict[str, Any]:
        """The last JSON line of standard output, which must be a summary."""
        last = json.loads(self.stdout.splitlines()[-1])
        assert last["type"] == "summary", last
        found: dict[str, Any] = last
        return found

    def error(self) -> dict[str, Any]:
        """The error object on standard error (of a run with --json)."""
        lines = [json.loads(line) for line in self.stderr.splitlines() if line.startswith("{")]
        errors = [line for line in lines if line["type"] == "error"]
        assert len(errors) == 1, self.stderr
        found: dict[str, Any] = errors[0]
        return found

    def describe(self) -> str:
        """For messages of assertions."""
        return f"dm {' '.join(self.arguments)}: {self.code}\n{self.stdout}{self.stderr}"


class Cluster:
    """A directory with a store, keys and a server; everything started in it ends with `close`."""

    def __init__(self, directory: Path, name: str) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.name = name
        self.home = directory / "store"
        self.user_key = make_key(directory / "user_key", f"{name}@test")
        self.known_hosts = directory / "known_hosts"
        self.known_hosts.touch()
        self.config = directory / "config.toml"
        self.environment = self._clean_environment()
        self.program: tuple[str, ...] = (str(DM),)
        self.server: Server | None = None

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def turn_hostile(self, mode: str) -> None:
        """From now on run `dm` with one rule broken (tests/support/hostile_dm.py)."""
        self.program = (sys.executable, str(HOSTILE_SCRIPT), mode)

    def turn_honest(self) -> None:
        """Run the installed `dm` again."""
        self.program = (str(DM),)

    def close(self) -> None:
        """End the server, if one runs."""
        if self.server is not None:
            self.server.kill()

    def _clean_environment(self) -> dict[str, str]:
        """Nothing of the machine's but PATH: no agent, no ssh configuration, no other store."""
        user_home = self.directory / "user"
        user_home.mkdir(exist_ok=True)
        return {
            "PATH": f"{DM.parent}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "HOME": str(user_home),
            "LC_ALL": "C.UTF-8",
            "DM_HOME": str(self.home),
            "DM_AUTHOR": f"{self.name} <{self.name}@test>",
            "DM_SSH_KEY": str(self.user_key.private),
            "DM_KNOWN_HOSTS": str(self.known_hosts),
        }

    # --- commands ---------------------------------------------------------------------------

    def run(
        self,
        *arguments: str | Path,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        timeout_s: float = RUN_TIMEOUT_S,
    ) -> Result:
        """Run `dm` to its end. With `check`, any exit code but 0 fails the test."""
        words = tuple(str(argument) for argument in arguments)
        done = subprocess.run(
            [*self.program, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**self.environment, **(env or {})},
            timeout=timeout_s,
        )
        result = Result(words, done.returncode, _text(done.stdout), _text(done.stderr))
        assert not check or result.code == 0, result.describe()
        return result

    def refused(self, *arguments: str | Path, code: int, saying: str = "") -> Result:
        """Run `dm` expecting it to fail with `code` and to say `saying` on standard error."""
        result = self.run(*arguments, check=False)
        assert result.code == code, f"expected exit {code}: {result.describe()}"
        assert saying.lower() in result.stderr.lower(), result.describe()
        assert "Traceback" not in result.stderr, result.describe()
        return result

    def start(self, *arguments: str | Path) -> Daemon:
        """Start `dm` and return at once; the caller ends it."""
        log = self.directory / f"dm-{arguments[0]}.log"
        return Daemon(
            [*self.program, *[str(one) for one in arguments]], log=log, environment=self.environment
        )

    def run_measured(self, *arguments: str | Path, timeout_s: float = 300.0) -> tuple[Result, int]:
        """Run `dm` and return the result and its peak resident size in bytes."""
        report = self.directory / "peak_rss"
        words = tuple(str(argument) for argument in arguments)
        done = subprocess.run(
            [sys.executable, "-S", "-E", PEAK_MEMORY_SCRIPT, report, *self.program, *words],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=self.environment,
            timeout=timeout_s,
        )
        result = Result(words, done.returncode, _text(done.stdout), _text(done.stderr))
        assert result.code == 0, result.describe()
        return result, int(report.read_text())

    # --- shorthands for what tests do all the time -----------------------------------------------

    def init(self, dot: str, files: Mapping[str, str | bytes] | None = None) -> None:
        """A new current dot, with `files` in its default subdot, uncommitted."""
        self.run("init", dot)
        self.write(dot, files or {})

    def tree(self, dot: str) -> Path:
        """The directory of `dot` (or dot@branch.subdot)."""
        return Path(self.run("dot", "path", dot).stdout.rstrip("\n"))

    def write(self, dot: str, files: Mapping[str, str | bytes]) -> None:
        """Write `files`, uncommitted, below the directory of `dot`."""
        if not files:
            return
        tree = self.tree(dot)
        for name, content in files.items():
            path = tree / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)

    def files(self, dot: str) -> dict[str, str]:
        """Contents of the regular files below the directory of `dot`, by relative path."""
        tree = self.tree(dot)
        return {
            str(path.relative_to(tree)): path.read_text(errors="replace")
            for path in sorted(tree.rglob("*"))
            if path.is_file() and not path.is_symlink()
        }

    def commit(self, message: str, *options: str, dot: str | None = None) -> str:
        """Commit and return the commit's id."""
        chosen = ("--dot", dot) if dot else ()
        return self.run("commit", "-m", message, *options, *chosen).stdout.strip()

    def messages(self, *revision: str, dot: str | None = None) -> list[str]:
        """Messages of the log, oldest first."""
        chosen = ("--dot", dot) if dot else ()
        log: list[dict[str, Any]] = self.run("log", "--json", *chosen, *revision).json()
        return [commit["message"] for commit in log]

    def branches(self, dot: str | None = None) -> list[str]:
        """Names of the branches, sorted."""
        chosen = ("--dot", dot) if dot else ()
        lines = self.run("branch", *chosen).stdout.splitlines()
        return sorted(line.removeprefix("*").strip() for line in lines)

    def dots(self) -> list[str]:
        """Names of the dots, as `dm list` writes them."""
        return [line.split("\t")[0] for line in self.run("list", "-H").stdout.splitlines()]

    def tip(self, revision: str = "HEAD", *, dot: str | None = None) -> str:
        """The full id of a revision."""
        chosen = ("--dot", dot) if dot else ()
        log = self.run("log", "--json", "-n", "1", *chosen, revision).json()
        tip: str = log[-1]["id"]
        return tip

    def stored_bytes(self) -> int:
        """Apparent size of the store's directory, as `du --apparent-size` counts it."""
        counted = subprocess.run(
            ["du", "--apparent-size", "--block-size=1", "--summarize", self.home],
            check=True,
            capture_output=True,
        )
        return int(counted.stdout.split()[0])

    # --- serving and being served -----------------------------------------------------------------

    def serve(self) -> "Server":
        """This store's own SSH server, started when it is not running."""
        if self.server is None:
            self.server = Server(self)
        return self.server

    def add_remote(
        self, name: str, other: "Cluster", *, user: str | None = None, port: int | None = None
    ) -> None:
        """Let this cluster's key into `other` and name it here.

        With `user` the key is that user's, whose dots live in the namespace of that name; without
        it is the administrator's.
        """
        server = other.serve()
        server.authorize(self.user_key, **({"user": user} if user else {"role": "admin"}))
        self.trust(server, port or server.port)
        self.run("remote", "add", name, server.url(user or "dm", port))

    def trust(self, server: "Server", port: int) -> None:
        """Know the server's host key at `port` (its own, or a proxy's)."""
        with self.known_hosts.open("a") as file:
            file.write(known_hosts_line(port, server.host_key.public))


class Server:
    """`dm serve --listen` of one cluster. Keeps its port over restarts."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.host_key = make_key(cluster.directory / "host_key", "host")
        self.authorized_keys = cluster.directory / "authorized_keys"
        self.authorized_keys.touch(mode=0o600)
        self.port = 0
        self.daemon = self._start()

    def _start(self) -> Daemon:
        cluster = self._cluster
        daemon = Daemon(
            [
                *cluster.program,
                *("serve", "--listen", f"127.0.0.1:{self.port}"),
                *("--host-key", self.host_key.private),
                *("--authorized-keys", self.authorized_keys),
            ],
            log=cluster.directory / "serve.log",
            environment=cluster.environment,
        )
        self.port = int(daemon.wait_for(r"listening on \S+:(\d+)\n")[1])
        return daemon

    def authorize(self, key: KeyPair, **options: str) -> None:
        """Let `key` in; options become dm-user="...", dm-role="...", dm-dots="...".

        Replaces what was said of that key before.
        """
        lines = self.authorized_keys.read_text().splitlines()
        words = ",".join(f'dm-{name}="{value}"' for name, value in options.items())
        others = [line for line in lines if not line.endswith(key.public)]
        text = "\n".join([*others, f"{words} {key.public}".lstrip(), ""])
        # Renamed into place: the server may read it at any moment.
        new = self.authorized_keys.with_suffix(".new")
        new.touch(mode=0o600)
        new.write_text(text)
        new.rename(self.authorized_keys)

    def url(self, user: str, port: int | None = None) -> str:
        """Where a client with an authorised key finds this store."""
        return f"ssh://{user}@127.0.0.1:{port or self.port}"

    def kill(self) -> None:
        """SIGKILL, sessions included."""
        self.daemon.kill()

    def restart(self) -> None:
        """Start again at the same port after `kill`."""
        self.daemon = self._start()


class Clusters:
    """Makes clusters in one directory and ends them all."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._made = ExitStack()

    def __call__(self, name: str) -> Cluster:
        return self._made.enter_context(Cluster(self._directory / name, name))

    def __enter__(self) -> "Clusters":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._made.close()


MakeCluster = Callable[[str], Cluster]


def _text(output: bytes) -> str:
    return output.decode(errors="surrogateescape")


def has_command(name: str) -> bool:
    """Whether a program is installed, the administrator's included."""
    folders = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin".split(":")
    return any(os.access(os.path.join(folder, name), os.X_OK) for folder in folders if folder)
