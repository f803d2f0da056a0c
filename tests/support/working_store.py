"""A real store in a temporary directory with the use cases bound to it, for engine tests."""

from pathlib import Path

from dmsync.engine import branches, commits, dots, history, trees
from dmsync.engine.settings import EngineSettings
from dmsync.engine.store import Store
from dmsync.storage.catalog import DotRow


class Workshop:
    """One store and shorthands that read like commands."""

    def __init__(self, home: Path) -> None:
        self.settings = EngineSettings(author="Ada <ada@example.org>", actor="ada", lock_wait_s=2)
        self.store = Store.open(str(home), self.settings, create=True)

    def close(self) -> None:
        self.store.close()

    def reopen(self) -> None:
        self.close()
        self.store = Store.open(self.store.home, self.settings)

    def attach(self, name: str, directory: Path, *, as_root: bool = False) -> DotRow:
        directory.mkdir(exist_ok=True)
        return dots.init_dot(self.store, name, at=str(directory), as_root=as_root)

    def commit(self, dot: DotRow, message: str, **wishes: object) -> commits.CommitSummary:
        request = commits.CommitRequest(message, **wishes)  # type: ignore[arg-type]
        return commits.commit(self.store, dot, request)

    def messages(self, dot: DotRow, revision: str | None = None) -> list[str]:
        """Messages of the log, oldest first."""
        found = history.log_commits(self.store, dot, revision)
        return [info.message for info in reversed(found)]

    def changes(self, dot: DotRow) -> list[tuple[str, bytes]]:
        """Uncommitted changes as (kind, path)."""
        return [(c.kind, c.path) for c in trees.status(self.store, dot.dot).changes]

    def checkout(self, dot: DotRow, branch: str, *, create: bool = False) -> None:
        branches.checkout(self.store, dot, branch, create=create)

    def reset(self, dot: DotRow, revision: str, *, hard: bool = False) -> branches.SwitchSummary:
        return branches.reset(self.store, dot, revision, hard=hard)
