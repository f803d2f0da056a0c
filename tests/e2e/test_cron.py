"""What a line in a crontab relies on: a bare environment, silence, exit codes that say "later"."""

import json
import subprocess
import sys
from pathlib import Path

from tests.support.cluster import DM, Cluster
from tests.support.processes import Daemon

HOLD_LOCK = """
import fcntl, struct, sys, time
# One open-file-description write lock over the whole of each file named.
held = []
for path in sys.argv[1:]:
    file = open(path, "r+b")
    lock = struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0)
    fcntl.fcntl(file, 37, lock)  # F_OFD_SETLK
    held.append(file)
print("holding", flush=True)
time.sleep(600)
"""


def bare_environment(cluster: Cluster) -> dict[str, str]:
    """What cron gives: HOME and PATH, and nothing of dm's."""
    return {"HOME": cluster.environment["HOME"], "PATH": "/usr/bin:/bin"}


def test_push_all_from_cron_is_silent(pair: tuple[Cluster, Cluster]) -> None:
    """`env -i HOME PATH dm push -q --all REMOTE`: everything is in the store and in files."""
    near, far = pair
    near.init("apples", {"HELLO": "world"})
    near.commit("hello")
    near.run("checkout", "-b", "other")
    near.commit("on other")
    near.init("pears", {"HELLO": "world"})
    near.commit("hello")
    install_where_cron_finds_it(near)
    for _ in range(2):  # the second time there is nothing to do, which is just as well
        done = subprocess.run(
            [DM, "--home", near.home, "push", "-q", "--all", "far"],
            env=bare_environment(near),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=60,
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert sorted(far.dots()) == ["apples", "pears"]
    assert far.messages("other", dot="apples") == ["hello", "on other"]


def install_where_cron_finds_it(cluster: Cluster) -> None:
    """The user's own key and known hosts in their usual places."""
    folder = Path(cluster.environment["HOME"]) / ".ssh"
    folder.mkdir(mode=0o700)
    private = folder / "id_ed25519"
    private.write_text(cluster.user_key.private.read_text())
    private.chmod(0o600)
    (folder / "known_hosts").write_text(cluster.known_hosts.read_text())


def test_an_unreachable_remote_says_so_once_and_is_worth_retrying(
    pair: tuple[Cluster, Cluster],
) -> None:
    near, far = pair
    near.init("apples", {"HELLO": "world"})
    near.commit("hello")
    far.close()
    refused = near.refused("push", "-q", "--all", "far", code=13)
    assert refused.stdout == ""
    assert refused.stderr.startswith("dm: error: ")
    assert len(refused.stderr.splitlines()) <= 2


def test_a_busy_store_is_reported_at_once_with_no_lock_wait(cluster: Cluster) -> None:
    """75: try again later. Queries never wait."""
    cluster.init("apples", {"HELLO": "world"})
    cluster.commit("hello")
    with holding_locks(cluster):
        busy = cluster.run("commit", "-m", "x", "--lock-wait", "0", "--json", check=False)
        assert busy.code == 75, busy.describe()
        assert json.loads(busy.stderr.splitlines()[-1])["code"] == "busy"
        assert cluster.messages() == ["hello"]
        assert cluster.dots() == ["apples"]
    cluster.commit("x")
    assert cluster.messages() == ["hello", "x"]


def holding_locks(cluster: Cluster) -> Daemon:
    """Another process that holds the event log and every dot exclusively."""
    locks = [cluster.home / "events" / "lock", *cluster.home.glob("dots/*/lock")]
    for lock in locks:
        lock.touch()
    holder = Daemon([sys.executable, "-c", HOLD_LOCK, *locks], log=cluster.directory / "holder.log")
    holder.wait_for("holding")
    return holder
