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
    connection.execute("UPDATE commits SET reachable = reachable + 7")
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


# --- names and texts that cannot be meant -------------------------------------------------------


@pytest.mark.parametrize("name", ["app@other", "app@absent", "app.sub"])
def test_a_branch_or_subdot_in_a_dots_name_is_not_silently_ignored(
    dm: Dm, app: Path, name: str
) -> None:
    dm.run("commit", "-m", "first")
    dm.run("branch", "other")
    part = name[3:]
    assert part in str(dm.error("--dot", name, "commit", "-m", "x", code=2)["message"])
    dm.environment["DM_DOT"] = name
    assert part in str(dm.error("status", code=2)["message"])
    assert dm.text("log", "--dot", "app", "--oneline").count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((b"commit", b"-m", b"caf\xe9"), "'-m'"),
        ((b"commit", b"-m", b"x", b"--author", b"caf\xe9"), "'--author'"),
        ((b"commit", b"-m", b"x", b"-d", b"k=\xe9"), "'-d'"),
        ((b"push", b"u\xff"), "'[REMOTE]'"),
        ((b"push", b"/u\xff"), "'[REMOTE]'"),
        ((b"dot", b"set-upstream", b"u", b"d\xff"), "'[DOT] REMOTE REMOTE-DOT'"),
        ((b"--dot", b"d\xff", b"status"), "'--dot'"),
        ((b"checkout", b"b\xff"), "'BRANCH'"),
        ((b"log", b"b\xff"), "'[REV|A..B|^REV]...'"),
    ],
)
def test_bytes_that_are_no_text_are_refused_by_the_arguments_name(
    dm: Dm, app: Path, arguments: tuple[bytes, ...], named: str
) -> None:
    message = str(dm.error(*arguments, code=2)["message"])
    assert named in message and "not UTF-8" in message and "\\x" in message


def test_an_author_that_is_no_text_is_refused_by_its_variable(dm: Dm, app: Path) -> None:
    dm.environment["DM_AUTHOR"] = os.fsdecode(b"caf\xe9")
    assert "DM_AUTHOR" in str(dm.error("commit", "-m", "x", code=2)["message"])


def test_paths_may_be_any_bytes(dm: Dm, tmp_path: Path) -> None:
    tree = Path(os.fsdecode(os.fsencode(tmp_path) + b"/t\xff"))
    tree.mkdir()
    Path(os.fsdecode(os.fsencode(tree) + b"/f\xe9")).write_text("bytes")
    dm.run("init", "app", "--at", os.fsencode(tree))
    dm.run("commit", "-m", "first")
    assert dm.run("cat", b"HEAD:__default__/f\xe9").stdout == b"bytes"


def test_a_whole_commit_is_no_file(dm: Dm, app: Path) -> None:
    dm.run("commit", "-m", "first")
    assert "HEAD names a whole commit" in str(dm.error("cat", "HEAD", code=10)["message"])


def test_an_unborn_branch_is_called_by_its_name(dm: Dm, app: Path) -> None:
    assert "branch master has" in str(dm.error("show", "HEAD", code=10)["message"])


@pytest.mark.parametrize("with_store", [True, False])
def test_a_dry_init_refuses_a_directory_around_the_store(
    dm: Dm, tmp_path: Path, with_store: bool
) -> None:
    if with_store:
        dm.run("init", "--bare")
    real = str(dm.error("init", "y", "--at", str(tmp_path), code=2)["message"])
    assert "lie within one another" in real
    assert str(dm.error("init", "-n", "y", "--at", str(tmp_path), code=2)["message"]) == real


def test_a_dry_init_refuses_an_attached_directory(dm: Dm, app: Path) -> None:
    assert "attached" in str(dm.error("init", "-n", "y", "--at", str(app), code=2)["message"])


def test_no_directory_is_made_in_the_users_own_tree(dm: Dm, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "real").mkdir(parents=True)
    dm.run("init", "rr", "--at", str(tree), "--as-root")
    assert "typo" in str(dm.error("dot", "path", "rr.typo", code=10)["message"])
    dm.run("dot", "path", "rr", code=10)
    assert [path.name for path in tree.iterdir()] == ["real"]
    assert dm.text("dot", "path", "rr.real") == f"{tree}/real\n"


def test_help_as_json_lists_the_commands(dm: Dm) -> None:
    document = dm.json("help")
    listed = {c["name"]: c["about"] for c in document["commands"]}  # type: ignore[attr-defined]
    assert listed["commit"] == "Record the state of the whole dot."
    below = dm.json("help", "remote")["commands"]
    assert "add" in [c["name"] for c in below]  # type: ignore[attr-defined]
    assert dm.json("help", "commit")["command"] == "dm commit"


# --- what is said about pushes and pulls --------------------------------------------------------


@pytest.fixture
def there(dm: Dm, app: Path, tmp_path: Path) -> str:
    """A second store, `there`, that `app` was pushed to with one commit."""
    dm.run("commit", "-m", "first")
    path = str(tmp_path / "there")
    dm.run("--home", path, "init", "--bare")
    dm.run("remote", "add", "there", path)
    dm.run("push", "there")
    return path


@pytest.fixture
def other(there: str, tmp_path: Path) -> Dm:
    """A clone of `app`, with a file of its own to change."""
    other = Dm(tmp_path, "other")
    other.run("clone", there, "app")
    return other


def commit_file(dm: Dm, name: str) -> None:
    tree = Path(dm.text("dot", "path").rstrip("\n"))
    (tree / name).write_text(name)
    dm.run("commit", "-m", name)


@pytest.mark.parametrize("command", [("push",), ("pull",), ("fetch",), ("clone", "app")])
def test_an_address_where_no_store_answers_is_not_remembered(
    dm: Dm, app: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    dm.run("commit", "-m", "first")
    verb, *dot = command
    dm.run(verb, str(tmp_path / "absent"), *dot, code=10)
    assert dm.text("remote") == ""


def test_an_address_that_answers_is_remembered_before_its_branches(
    dm: Dm, app: Path, tmp_path: Path
) -> None:
    dm.run("commit", "-m", "first")
    path = str(tmp_path / "disk")
    dm.run("--home", path, "init", "--bare")
    dm.run("push", path, "-n")
    assert dm.text("remote") == ""
    done = dm.run("push", path)
    assert b"is now known as remote disk" in done.stderr
    assert dm.text("remote", "-v") == f"disk\t{path}\n"
    assert dm.text("show", "disk/master") == dm.text("show", "HEAD")


def test_divergence_is_told_with_the_options_of_the_command(dm: Dm, other: Dm) -> None:
    commit_file(other, "theirs")
    other.run("push", "there")
    commit_file(dm, "ours")
    ours = dm.text("log", "HEAD", "--json", "-n", "1")
    ours_id = json.loads(ours)[0]["id"][:12]
    pull = dm.error("pull", "there", code=14)
    assert f"local one ({ours_id})" in str(pull["message"])
    assert "--force takes" in str(pull["hint"]) and "lease" not in str(pull["hint"])
    push = dm.error("push", "there", code=14)
    assert f"local one ({ours_id})" in str(push["message"])
    for told in (pull, push):
        assert "source" not in str(told["message"]) and "target" not in str(told["message"])


def test_an_unknown_dot_is_called_as_it_was_written(dm: Dm, there: str) -> None:
    dm.run("init", "lonely")
    message = str(dm.error("fetch", "there", "lonely", code=10)["message"])
    assert message.startswith("no dot lonely at there")
    message = str(dm.error("clone", "there", "ns/absent", code=10)["message"])
    assert message.startswith("no dot ns/absent at there")
    message = str(dm.error("clone", "there", "absent", code=10)["message"])
    assert message.startswith("no dot absent at there")


def test_a_dry_push_says_what_would_be_sent(dm: Dm, there: str) -> None:
    commit_file(dm, "second")
    told = dm.text("push", "there", "-n")
    assert "Done!" not in told
    assert "would send 1 commit, " in told and "iB before compression" in told
    assert "  master " in told and "(fast-forward)" in told
    assert dm.text("push", "there").endswith("Done!\n")


def test_a_push_with_refused_branches_is_not_done(dm: Dm, other: Dm) -> None:
    commit_file(other, "theirs")
    other.run("push", "there")
    dm.run("branch", "second")
    commit_file(dm, "ours")
    told = dm.run("push", "there", "--all", code=14)
    assert b"Done!" not in told.stdout
    assert b"1 ref pushed, 1 refused." in told.stdout


def test_fetch_says_which_branches_moved(dm: Dm, other: Dm) -> None:
    commit_file(other, "theirs")
    other.run("push", "there")
    told = dm.text("fetch", "there")
    assert "  there/master " in told and told.endswith("Done!\n")
    assert dm.text("fetch", "there").endswith("Already up to date.\n")
    dm.run("branch", "side")
    dm.run("--home", str(other.home.parent / "there"), "branch", "side", "HEAD")
    told = dm.text("fetch", "there")  # nothing to transfer, and yet news
    assert "  there/side (none) -> " in told and "up to date" not in told


# --- a clone in a directory of the user's -------------------------------------------------------


def test_a_clone_is_written_into_a_directory(dm: Dm, app: Path, there: str, tmp_path: Path) -> None:
    (app / "sub").mkdir()
    (app / "sub" / "b.txt").write_text("two\n")
    app.chmod(0o750)
    dm.run("commit", "-m", "second")
    dm.run("push", "there")
    other = Dm(tmp_path, "other")
    target = tmp_path / "new" / "data"
    summary = other.json("clone", there, "app", "--at", str(target))
    assert summary["tree"] == str(target)
    assert (target / "sub" / "b.txt").read_text() == "two\n"
    assert target.stat().st_mode & 0o7777 == 0o750
    assert other.text("dot", "path") == f"{target}\n"
    status = other.json("status")
    assert status["changes"] == []
    again = other.json("clone", there, "app", "--at", str(target))
    assert again["tree"] == str(target)
    (target / "c").write_text("three")
    other.run("commit", "-m", "third")
    assert "+ __default__/c" in other.text("show", "HEAD")


def test_a_clone_of_several_subdots_needs_as_root(dm: Dm, tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    for name in ("db", "files"):
        (tree / name).mkdir(parents=True)
        (tree / name / "x").write_text(name)
    dm.run("init", "app", "--at", str(tree), "--as-root")
    dm.run("commit", "-m", "first")
    other, target = Dm(tmp_path, "other"), tmp_path / "target"
    error = other.error("clone", str(dm.home), "app", "--at", str(target), code=2)
    assert "subdot db" in str(error["message"]) and "--as-root" in str(error["hint"])
    assert not target.exists()
    other.run("clone", str(dm.home), "app", "--at", str(target), "--as-root")
    assert (target / "db" / "x").read_text() == "db"
    assert other.json("status")["changes"] == []


def test_a_clone_takes_only_a_directory_that_is_free(dm: Dm, there: str, tmp_path: Path) -> None:
    other = Dm(tmp_path, "other")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("mine")
    for target, text in (
        (full, "not empty"),
        (full / "mine", "not a directory"),
        (other.home / "tree", "within one another"),
    ):
        error = other.error("clone", there, "app", "--at", str(target), code=2)
        assert text in str(error["message"])
        assert other.text("list", "-H") == ""
    assert "--at" in str(other.error("clone", there, "app", "--as-root", code=2)["message"])
    assert [path.name for path in full.iterdir()] == ["mine"]


def test_a_dot_with_a_tree_in_the_store_gets_no_second_one(other: Dm, there: str) -> None:
    commit_file(other, "x")
    target = other.home.parent / "target"
    error = other.error("clone", there, "app", "--at", str(target), code=2)
    assert "working trees in the store" in str(error["message"])
    assert not target.exists()


def test_a_clone_cut_while_its_directory_is_written_is_completed(
    there: str, tmp_path: Path
) -> None:
    other, target = Dm(tmp_path, "other"), tmp_path / "target"
    cut = (
        "import os\n"
        "from dmsync.engine import switching\n"
        "from dmsync.surfaces.cli.main import main\n"
        "switching.switch_tree = lambda *_, **__: os._exit(9)\n"
        f"main(['clone', {there!r}, 'app', '--at', {str(target)!r}])\n"
    )
    done = subprocess.run([sys.executable, "-c", cut], env=other.environment, timeout=60)
    assert done.returncode == 9
    assert list(target.iterdir()) == []
    assert other.json("clone", there, "app", "--at", str(target))["tree"] == str(target)
    assert (target / "a.txt").read_text() == "one\n"
    assert other.json("status")["changes"] == []
