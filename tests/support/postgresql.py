"""A real PostgreSQL server over a data directory, wherever that lies, as the user it insists on."""

import os
import pwd
import shutil
import subprocess
import tempfile
from pathlib import Path
from types import TracebackType

SYSTEM_USER = "postgres"
PORT = 54329
"""Only part of a socket's name: the server listens on no network."""
# A dot's tree lies below a store that only its owner may enter. Root runs the server as `postgres`
# with the one capability to pass such directories; the files themselves belong to `postgres`.
AS_POSTGRES = (
    "setpriv",
    f"--reuid={SYSTEM_USER}",
    f"--regid={SYSTEM_USER}",
    "--init-groups",
    "--inh-caps=+dac_read_search",
    "--ambient-caps=+dac_read_search",
    "--",
)


def programs_directory() -> Path | None:
    """Where the newest installed server's programs are, or None."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/postgres"), key=_version)
    return found[-1].parent if found else None


def _version(program: Path) -> int:
    return int(program.parent.parent.name)


class PostgresServer:
    """Start and stop PostgreSQL on `data`, talk to it over a socket of its own directory."""

    def __init__(self, data: Path) -> None:
        programs = programs_directory()
        assert programs is not None, "PostgreSQL is not installed"
        self.data = data
        self._programs = programs
        # Not below the test's directory: a socket's path may have 107 bytes, and others may enter.
        self._sockets = Path(tempfile.mkdtemp(prefix="dmsync-pg-"))
        if os.geteuid() == 0:
            owner = pwd.getpwnam(SYSTEM_USER)
            os.chown(self._sockets, owner.pw_uid, owner.pw_gid)
        self._running = False

    def __enter__(self) -> "PostgresServer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def initdb(self) -> None:
        """Make the (empty or missing) data directory a database with default settings."""
        self.data.mkdir(parents=True, exist_ok=True)
        if os.geteuid() == 0:
            owner = pwd.getpwnam(SYSTEM_USER)
            os.chown(self.data, owner.pw_uid, owner.pw_gid)
        self._run("initdb", "-D", self.data, "-A", "trust", "--locale=C", "-E", "UTF8")

    def start(self) -> None:
        """Start and wait until it answers."""
        options = f"-p {PORT} -k {self._sockets} -c listen_addresses=''"
        log = self._sockets / "server.log"
        self._run("pg_ctl", "-D", self.data, "-w", "-l", log, "-o", options, "start")
        self._running = True

    def stop(self) -> None:
        """Stop cleanly and wait: the directory then is one state, with nobody writing."""
        self._run("pg_ctl", "-D", self.data, "-w", "-m", "fast", "stop")
        self._running = False

    def close(self) -> None:
        """Stop at once if it runs, and remove the socket directory."""
        if self._running:
            self._run("pg_ctl", "-D", self.data, "-w", "-m", "immediate", "stop")
        shutil.rmtree(self._sockets)

    def sql(self, query: str) -> str:
        """Answer of one query, unaligned, without headers."""
        return self._run("psql", *self._address(), "-At", "-c", query, "postgres").strip()

    def pgbench(self, *arguments: str) -> str:
        """Run pgbench on the database `postgres`."""
        return self._run("pgbench", *self._address(), *arguments, "postgres")

    def row_counts(self) -> dict[str, int]:
        """Rows of each of pgbench's tables."""
        tables = ("accounts", "branches", "history", "tellers")
        return {name: int(self.sql(f"select count(*) from pgbench_{name}")) for name in tables}

    def amcheck(self) -> None:
        """Check every table and index with pg_amcheck; fails on the first damage."""
        self.sql("create extension if not exists amcheck")
        self._run("pg_amcheck", *self._address(), "--heapallindexed", "--jobs=2", "postgres")

    def _address(self) -> tuple[str, ...]:
        user = SYSTEM_USER if os.geteuid() == 0 else pwd.getpwuid(os.geteuid()).pw_name
        return ("-h", str(self._sockets), "-p", str(PORT), "-U", user)

    def _run(self, program: str, *arguments: str | Path) -> str:
        prefix = AS_POSTGRES if os.geteuid() == 0 else ()
        # A file, not a pipe: the server that pg_ctl starts keeps its output open.
        with tempfile.TemporaryFile() as output:
            done = subprocess.run(
                [*prefix, self._programs / program, *arguments],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "HOME": "/"},
            )
            output.seek(0)
            text = output.read().decode(errors="replace")
        assert done.returncode == 0, f"{program}: {done.returncode}\n{text}"
        return text
