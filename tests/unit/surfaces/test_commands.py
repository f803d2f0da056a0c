"""The real command in processes of its own, on real directories."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


class Dm:
    """`dm` with a store of its own and next to nothing in its environment."""

    def __init__(self, base: Path, name: str = "store") -> None:
        self.home = base / name
        self.environment = {
            "HOME": str(base),
            "PATH": os.environ["PATH"],
            "DM_HOME": str(self.home),
            "PYTHONPATH": str(ROOT),
        }

    def run(self, *arguments: str | bytes, code: int = 0) -> subprocess.CompletedProcess[bytes]:
        done = subprocess.run(
            [sys.executable, "-m", "dmsync", *arguments],
            env=self.environment, capture_output=True, stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip
        assert done.returncode == code, (arguments, done)
        assert b"Traceback" not in done.stderr
        return done

    def text(self, *arguments: str | bytes, code: int = 0) -> str:
        return self.run(*arguments, code=code).stdout.decode()

    def json(self, *arguments: str | bytes, code: int = 0) -> dict[str, object]:
        """The document of a query, or the last line of long work."""
        out = self.text(*arguments, "--json", code=code)
        try:
            return json.loads(out)  # type: ignore[no-any-return]
        except ValueError:
            return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]

    def error(self, *arguments: str | bytes, code: int) -> dict[str, object]:
        done = self.run(*arguments, "--json", code=code)
        return json.loads(done.stderr.splitlines()[-1])  # type: ignore[no-any-return]


@pytest.fixture
def dm(tmp_path: Path) -> Dm:
    return Dm(tmp_path)


@pytest.fixture
def app(dm: Dm, tmp_path: Path) -> Path:
    """A dot `app` over a directory with one file."""
    tree = tmp_path / "tree"
    tree.mkdir()
    (tree / "a.txt").write_text("one\n")
    dm.run("init", "app", "--at", str(tree))
    return tree


def test_without_a_store_queries_say_so_and_make_none(dm: Dm) -> None:
    assert dm.error("status", code=10)["code"] == "no-store"
    assert dm.text("list", "-H") == ""
    assert not dm.home.exists()


def test_a_commit_prints_its_id_and_the_log_shows_it(dm: Dm, app: Path) -> None:
    first = dm.text("commit", "-m", "first").strip()
    (app / "a.txt").write_text("two\n")
    second = dm.json("commit", "-m", "second\nmore", "-d", "ticket=4=2")
    assert second["type"] == "summary"
    assert second["parents"] == [first]
    assert {"files_changed", "bytes_scanned", "bytes_stored", "capture", "elapsed_s"} <= set(second)
    log = dm.text("log")
    assert log.index(first) < log.index(str(second["commit"]))
    assert "\nticket: 4=2\n\n    second\n    more\n" in log
    assert [c["id"] for c in json.loads(dm.text("log", "--json", "--reverse", "-n", "1"))] == [
        second["commit"]
    ]
    assert dm.text("cat", "HEAD~1:__default__/a.txt") == "one\n"


def test_status_shows_names_escaped_and_json_has_the_bytes(dm: Dm, app: Path) -> None:
    dm.run("commit", "-m", "first")
    name = b"\x1b[31m\xff\n"
    Path(os.fsdecode(os.fsencode(app) + b"/" + name)).write_text("x")
    assert "+ __default__/\\x1b[31m\\xff\\n\n" in dm.text("status")
    (change,) = [c for c in dm.json("status")["changes"] if c["change"] == "+"]  # type: ignore[attr-defined]
    assert base64.b64decode(change["path_b64"]) == b"__default__/" + name


def test_list_for_scripts_has_seven_fields_with_a_trailing_tab(dm: Dm, app: Path) -> None:
    line = dm.text("list", "-H").rstrip("\n")
    fields = line.split("\t")
    assert len(fields) == 8 and fields[-1] == ""
    assert fields[:2] == ["app", "master"]
    assert int(fields[6]) == 4
    dm.run("commit", "-m", "first")
    assert dm.text("list", "-H").split("\t")[5:7] == ["1", "0"]
    assert "* app" in dm.text("list")
    assert "DOT" in dm.text("list").splitlines()[0]


def test_deleting_asks_and_without_a_terminal_refuses(dm: Dm, app: Path) -> None:
    error = dm.error("dot", "delete", "app", code=2)
    assert "terminal" in str(error["message"])
    dm.run("dot", "delete", "-n", "app", "-f")
    assert dm.text("list", "-H")
    dm.run("dot", "delete", "-f", "app")
    assert dm.text("list", "-H") == ""
    assert (app / "a.txt").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (("init", "app"), 1, "app exists already"),
        (("switch", "absent"), 10, "absent"),
        (("dot", "show", "absent"), 10, "doesn't exist"),
        (("log", "absent"), 10, "No commits match"),
        (("checkout", "absent"), 10, "Branch does not exist: absent"),
        (("checkout", "bad name"), 10, "bad name"),
        (("branch", "bad name"), 2, "invalid branch name"),
        (("push", "absent"), 10, "Unable to find remote 'absent'"),
        (("push",), 2, "Please specify which remote you want to push to"),
        (("remote", "rm", "absent"), 10, "No such remote 'absent'"),
        (("remote", "add", "r", "http://x"), 2, "invalid remote URL"),
        (("transfer", "show", "abc"), 10, "no such transfer"),
        (("commit", "-m", "x", "--fail-if-nothing"), 4, "nothing changed"),
        (("cat", "HEAD:absent"), 10, "absent"),
    ],
)
def test_what_cannot_be_done_has_its_exit_code_and_text(
    dm: Dm, app: Path, arguments: tuple[str, ...], code: int, text: str
) -> None:
    dm.run("commit", "-m", "first")
    assert text in str(dm.error(*arguments, code=code)["message"])


def test_reset_refuses_to_lose_changes_and_hard_does_it(dm: Dm, app: Path) -> None:
    dm.run("commit", "-m", "first")
    (app / "a.txt").write_text("changed")
    assert dm.error("reset", "HEAD", code=18)["code"] == "would-lose"
    assert (app / "a.txt").read_text() == "changed"
    assert dm.json("reset", "--hard", "HEAD", "-n")["dry_run"] is True
    assert (app / "a.txt").read_text() == "changed"
    dm.run("reset", "--hard", "HEAD")
    assert (app / "a.txt").read_text() == "one\n"


def test_branches_are_made_switched_renamed_and_deleted(dm: Dm, app: Path) -> None:
    dm.run("commit", "-m", "first")
    dm.run("checkout", "-b", "other")
    assert dm.text("branch") == "  master\n* other\n"
    dm.run("branch", "-m", "other", "renamed")
    dm.run("branch", "-d", "master")
    assert dm.text("branch") == "* renamed\n"


def test_remotes_are_kept_by_absolute_path(dm: Dm, tmp_path: Path) -> None:
    dm.run("remote", "add", "disk", str(tmp_path / "x" / ".." / "other"))
    assert dm.text("remote") == "disk\n"
    assert dm.text("remote", "-v") == f"disk\t{tmp_path / 'other'}\n"
    dm.run("remote", "rename", "disk", "platte")
    dm.run("remote", "rm", "platte")
    assert dm.text("remote") == ""


def test_fsck_finds_a_harmed_pack_and_names_the_commits(dm: Dm, app: Path) -> None:
    (app / "big").write_bytes(os.urandom(300_000))
    commit = dm.text("commit", "-m", "first").strip()
    assert dm.json("fsck", "--full")["ok"] is True
    (pack,) = dm.home.rglob("*.pack")
    content = bytearray(pack.read_bytes())
    content[len(content) // 2] ^= 1
    pack.chmod(0o600)
    pack.write_bytes(content)
    report = dm.json("fsck", "--full", code=16)
    assert any(commit in p["commits"] for p in report["problems"])  # type: ignore[attr-defined]
    assert pack.name in dm.text("fsck", "--full", code=16)


def test_fsck_finds_a_catalog_that_is_not_what_the_log_says(dm: Dm, app: Path) -> None:
    import sqlite3

    dm.run("commit", "-m", "first")
    connection = sqlite3.connect(dm.home / "catalog.sqlite")
    connection.execute("UPDATE dots SET owner = 'somebody else'")
    connection.commit()
    connection.close()
    report = dm.json("fsck", code=16)
    assert [p["where"] for p in report["problems"]] == ["catalog.sqlite"]  # type: ignore[attr-defined]


def test_queries_load_neither_network_nor_display(dm: Dm, app: Path) -> None:
    slow = ["asyncssh", "asyncio", "rich", "sqlite_utils"]
    for query in (["list"], ["status"], ["log"]):
        code = (
            "import sys\nfrom dmsync.surfaces.cli.main import main\n"
            f"assert main({query!r}) == 0\n"
            f"print([m for m in {slow!r} if m in sys.modules], file=sys.stderr)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=dm.environment, capture_output=True, text=True
        )
        assert done.stderr.splitlines()[-1] == "[]", (query, done.stderr)


def test_push_and_clone_between_two_stores_on_one_machine(
    dm: Dm, app: Path, tmp_path: Path
) -> None:
    dm.run("commit", "-m", "first")
    dm.run("remote", "add", "there", str(tmp_path / "there"))
    dm.run("push", "there", code=10)  # a path without a store may be a disk that is not mounted
    assert not (tmp_path / "there").exists()
    dm.run("--home", str(tmp_path / "there"), "init", "--bare")
    assert dm.text("push", "there") == "Pushing app to there:app\nDone!\n"
    assert dm.run("push", "there", "-q").stdout == b""
    assert dm.json("push", "there", "--all")["failed"] == 0
    other = Dm(tmp_path, "other")
    cloned = other.json("clone", str(tmp_path / "there"), "app")
    assert cloned["created"] is True
    assert other.text("log", "--oneline").endswith("first\n")
    assert json.loads(dm.text("transfer", "list", "--json"))[0]["status"] == "done"
