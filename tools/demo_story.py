"""The story that `tools/demo` tells; every claim in it is checked, and a false one ends it."""

import hashlib
import json
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from tests.support.cluster import Cluster, Clusters, Result
from tests.support.processes import Daemon, wait_until
from tests.support.tree import file_hashes

ACCOUNTS: Final = 50_000
OPENING_BALANCE: Final = 100
GOODS: Final = 200_000
DATABASE: Final = "shop.db"
FILES: Final = "__default__"

# The application: moves money between accounts for ever, each transfer one transaction.
SHOP = """
import random, sqlite3, sys
shop = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
while True:
    giver, taker = random.sample(range(1, int(sys.argv[2])), 2)
    shop.execute("begin immediate")
    shop.execute("update accounts set balance = balance - 1 where id = ?", (giver,))
    shop.execute("update accounts set balance = balance + 1 where id = ?", (taker,))
    shop.execute("insert into transfers (giver, taker) values (?, ?)", (giver, taker))
    shop.execute("commit")
"""

# The quiesce hook: holds the write lock from `ready` until its standard input closes. It leaves
# without closing: the last connection to close would fold the write-ahead log into the database.
HOLD = """
import os, sqlite3, sys
shop = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
shop.execute("begin immediate")
print("ready", flush=True)
sys.stdin.read()
shop.execute("rollback")
os._exit(0)
"""


def say(text: str) -> None:
    """One remark of the narrator."""
    print(f"\n# {text}", flush=True)


def prove(claim: str, holds: bool) -> None:
    """State a claim that was checked; a false one ends the demonstration."""
    print(f"  {'ok' if holds else 'FALSE'}: {claim}", flush=True)
    if not holds:
        sys.exit(1)


def dm(cluster: Cluster, *arguments: str | Path) -> Result:
    """Run `dm` on a cluster, showing the command and the first lines of what it prints."""
    words = [str(argument) for argument in arguments]
    print(f"{cluster.name}$ dm {shlex.join(words)}", flush=True)
    result = cluster.run(*arguments)
    if "--json" not in words:
        for line in result.stdout.splitlines()[:12]:
            print(f"    {line}")
    return result


class Shop:
    """The application and its database, in a directory of its own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.database = directory / DATABASE
        directory.mkdir()
        with sqlite3.connect(self.database) as shop:
            shop.execute("pragma journal_mode=wal")
            shop.execute("create table accounts (id integer primary key, balance integer)")
            shop.execute("create table transfers (id integer primary key, giver int, taker int)")
            shop.execute("create table goods (id integer primary key, description text)")
            goods = ((hashlib.sha512(number.to_bytes(4)).hexdigest(),) for number in range(GOODS))
            shop.executemany("insert into goods (description) values (?)", goods)
            rows = ((number, OPENING_BALANCE) for number in range(1, ACCOUNTS + 1))
            shop.executemany("insert into accounts values (?, ?)", rows)
        shop.close()
        self._process: Daemon | None = None

    def open(self) -> None:
        """Start taking transfers."""
        command = [sys.executable, "-c", SHOP, str(self.database), str(ACCOUNTS)]
        self._process = Daemon(command, log=self.directory.parent / "shop.log")
        self.wait_for_business()

    def close(self) -> None:
        """Stop in the middle of whatever it is doing, as a power cut would."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def wait_for_business(self, transfers: int = 300) -> None:
        """Return when so many more transfers were made."""
        goal = count_transfers(self.database) + transfers
        wait_until(lambda: count_transfers(self.database) >= goal, what="transfers to be made")


def query(database: Path, text: str) -> str:
    """First value of a query on a database."""
    connection = sqlite3.connect(database, timeout=60)
    try:
        return str(connection.execute(text).fetchone()[0])
    finally:
        connection.close()


def count_transfers(database: Path) -> int:
    """How many transfers the database knows."""
    return int(query(database, "select count(*) from transfers"))


def prove_sound(directory: Path) -> int:
    """SQLite's own check, and that no money was made or lost; the number of transfers.

    Looks at a copy: opening a database changes the files beside it.
    """
    with tempfile.TemporaryDirectory(prefix="dm-demo-") as scratch:
        copy = Path(scratch) / "copy"
        shutil.copytree(directory, copy)
        database = copy / DATABASE
        prove("PRAGMA integrity_check says ok", query(database, "pragma integrity_check") == "ok")
        money = int(query(database, "select sum(balance) from accounts"))
        prove(f"all {money} coins are there", money == ACCOUNTS * OPENING_BALANCE)
        return count_transfers(database)


def prove_same_commit(one: Cluster, other: Cluster) -> None:
    """Every file of the commit has the same SHA-256 on both clusters."""
    hashes = []
    for cluster in (one, other):
        listing = cluster.run("ls", f"HEAD:{FILES}", "--json").json()
        names = sorted(entry["path"] for entry in listing)
        hashes.append({name: content_hash(cluster, name) for name in names})
    prove(f"sha256 of {len(hashes[0])} committed files agree", hashes[0] == hashes[1] != {})


def content_hash(cluster: Cluster, path: str) -> str:
    """SHA-256 of a file in the current commit."""
    command = [*cluster.program, "cat", f"HEAD:{FILES}/{Path(path).name}"]
    done = subprocess.run(command, env=cluster.environment, capture_output=True, check=True)
    return hashlib.sha256(done.stdout).hexdigest()


def configure_hook(cluster: Cluster, shop: Shop) -> None:
    """Tell dm how to keep the shop from writing while a commit reads."""
    command = shlex.join([sys.executable, "-c", HOLD, str(shop.database)])
    cluster.config.write_text(f"[dot.shop.hooks]\nhold = {json.dumps(command)}\n")
    cluster.config.chmod(0o600)
    cluster.environment["DM_CONFIG"] = str(cluster.config)


def commit(cluster: Cluster, message: str) -> None:
    """Commit and say what it cost."""
    summary = dm(cluster, "commit", "-m", message, "--json").summary()
    print(
        f"    {summary['commit'][:12]}: {summary['bytes_scanned'] / 1e6:.1f} MB looked at, "
        f"{summary['bytes_stored'] / 1e6:.2f} MB stored, writers held for "
        f"{summary['capture_pause_ms']:.0f} ms, capture: {summary['capture']['driver']}"
    )


def push(cluster: Cluster, *arguments: str) -> None:
    """Push and say what travelled."""
    summary = dm(cluster, "push", *arguments, "--json").summary()
    print(
        f"    {summary['commits_sent']} commits in {summary['bytes_sent'] / 1e6:.2f} MB "
        f"and {summary['round_trips']} round trips"
    )


def tell(office: Cluster, vault: Cluster, depot: Cluster, shop: Shop) -> None:
    """The story."""
    say(f"A shop keeps {ACCOUNTS} accounts in SQLite and never stops taking transfers.")
    shop.open()
    configure_hook(office, shop)
    dm(office, "init", "shop", "--at", shop.directory)
    commit(office, "opening day")
    prove("the shop went on after the commit", business_goes_on(shop))

    say("Another cluster, the vault, gets all of it over SSH; a third one clones it from there.")
    office.add_remote("vault", vault)
    depot.add_remote("vault", vault)
    push(office, "vault")
    dm(vault, "switch", "shop")
    dm(depot, "clone", "vault", "shop")
    for other in (vault, depot):
        prove_same_commit(office, other)
    first = prove_sound(depot.tree("shop"))

    say("Business goes on; the next commit and push carry only what changed.")
    shop.wait_for_business()
    commit(office, "a busy afternoon")
    push(office, "vault")
    dm(depot, "pull", "vault")
    for other in (vault, depot):
        prove_same_commit(office, other)
    second = prove_sound(depot.tree("shop"))
    prove(f"the copy moved on from {first} to {second} transfers", second > first)

    tell_of_a_branch(office, vault)
    tell_of_an_accident(office, shop)
    tell_the_end(office, vault, shop)


def business_goes_on(shop: Shop) -> bool:
    """Whether transfers are still being made."""
    shop.wait_for_business(10)
    return True


def tell_of_a_branch(office: Cluster, vault: Cluster) -> None:
    """Try something on the copy, without anybody noticing."""
    say("On the copy somebody tries out a bonus, on a branch. Nobody else sees it.")
    dm(vault, "checkout", "-b", "bonus")
    database = vault.tree("shop") / DATABASE
    with sqlite3.connect(database) as connection:
        connection.execute("update accounts set balance = balance + 10")
    connection.close()
    dm(vault, "commit", "-m", "ten coins for everybody")
    dm(vault, "diff", "master", "bonus", "--stat")
    dm(vault, "checkout", "master")
    prove_sound(vault.tree("shop"))
    say("The office fetches the branch to look at it; its own line does not move.")
    dm(office, "fetch", "vault")
    dm(office, "log", "-n", "2", "vault/bonus")


def tell_of_an_accident(office: Cluster, shop: Shop) -> None:
    """Delete everything, and have it back."""
    say(
        "The shop is stopped in mid-transfer. Somebody deletes all accounts, and even commits that."
    )
    shop.close()
    dm(office, "commit", "-m", "closing time")
    before = file_hashes(shop.directory)
    with sqlite3.connect(shop.database) as connection:
        connection.execute("delete from accounts")
    connection.close()
    dm(office, "commit", "-m", "oops")
    dm(office, "reset", "--hard", "HEAD^")
    prove("every file is what it was before the accident", file_hashes(shop.directory) == before)


def tell_the_end(office: Cluster, vault: Cluster, shop: Shop) -> None:
    """Both sides hold the same bytes."""
    say("At the end of the day both sides hold the same bytes, and every stored one is checked.")
    push(office, "vault")
    here, there = file_hashes(shop.directory), file_hashes(vault.tree("shop"))
    for name, digest in here.items():
        print(f"    {digest[:16]} {name} / {there.get(name, 'missing')[:16]}")
    prove(f"sha256 of all {len(here)} files agree in both directories", here == there != {})
    rows = [prove_sound(place) for place in (shop.directory, vault.tree("shop"))]
    prove(f"both databases hold {rows[0]} transfers", rows[0] == rows[1])
    for cluster in (office, vault):
        dm(cluster, "fsck", "--full")
        dm(cluster, "log", "-n", "2")


def main() -> None:
    """Set the scene, tell the story, clear away."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="dm-demo-") as directory:
        scene = Path(directory)
        shop = Shop(scene / "shop")
        with Clusters(scene) as make_cluster:
            office, vault, depot = (make_cluster(name) for name in ("office", "vault", "depot"))
            try:
                tell(office, vault, depot, shop)
            finally:
                shop.close()
    say(f"Done in {time.monotonic() - started:.0f} s. Nothing is left behind.")


if __name__ == "__main__":
    main()
