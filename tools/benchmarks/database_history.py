"""A database committed again and again, by dm at every round and by restic at some."""

from pathlib import Path

from tools.benchmarks.data_sets import Database
from tools.benchmarks.peers import Dm, Restic


class DatabaseHistory:
    """A database that lives on in `directory`, and the stores that hold its versions."""

    def __init__(self, directory: Path, fresh: Database, transactions: int) -> None:
        """Copy the fresh database and commit it once with both."""
        directory.mkdir()
        self.directory = directory
        self.database = fresh.copied_to(directory / "data")
        self.source = self.database.data
        self.dm = Dm(directory)
        self.restic = Restic(directory)
        self._transactions = transactions
        self.dm.commit(self.source)
        self.restic.commit(self.source)

    def advance(self) -> None:
        """One round more of transactions; nothing is committed."""
        self.database.advance(self._transactions)

    def live_through(self, rounds: int) -> None:
        """So many rounds, each committed by dm, and the last one by restic."""
        for _ in range(rounds):
            self.advance()
            self.dm.commit(self.source)
        self.restic.commit(self.source)
