"""`dm diff` as people use it: what is printed, what JSON says, whose commands are run."""

import json
import os
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest


class Shop:
    """A store of its own and a dot over `tree`, driven through the installed dm."""

    def __init__(self, base: Path) -> None:
        self.base = base
        self.tree = base / "tree"
        self.environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "HOME": str(base),
            "DM_HOME": str(base / "store"),
            "DM_AUTHOR": "ada",
        }
        self.tree.mkdir()

    def run(self, *arguments: str, code: int = 0) -> str:
        done = subprocess.run(
            ["dm", *arguments], env=self.environment, capture_output=True, timeout=100
        )
        assert done.returncode == code, (arguments, done)
        assert b"Traceback" not in done.stderr
        self.said = done.stderr.decode()
        return done.stdout.decode()

    def json(self, *arguments: str) -> list[dict[str, object]]:
        found: list[dict[str, object]] = json.loads(self.run("diff", "--json", *arguments))
        return found

    def configure(self, text: str) -> None:
        path = self.base / ".config" / "dm" / "config.toml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o600)


@pytest.fixture
def shop(tmp_path: Path) -> Shop:
    shop = Shop(tmp_path)
    (shop.tree / "a.txt").write_text("one\ntwo\nthree\n")
    (shop.tree / "conf").mkdir()
    (shop.tree / "conf" / "x.ini").write_text("x = 1\n")
    os.symlink("a.txt", shop.tree / "link")
    shop.run("init", "shop", "--at", str(shop.tree))
    shop.run("commit", "-m", "first")
    return shop


def test_names_and_filters(shop: Shop) -> None:
    (shop.tree / "conf" / "x.ini").rename(shop.tree / "conf" / "y.ini")
    (shop.tree / "a.txt").write_text("other\n")
    (shop.tree / "b\tc").write_text("one\ntwo\nthree\n")
    assert shop.run("diff", "--name-only") == (
        "__default__/a.txt\n__default__/b\\tc\n__default__/conf/y.ini\n"
    )
    assert shop.run("diff", "--name-status") == (
        "*\t__default__/a.txt\nC\t__default__/a.txt\t__default__/b\\tc\n"
        "R\t__default__/conf/x.ini\t__default__/conf/y.ini\n"
    )
    only = "R __default__/conf/x.ini -> __default__/conf/y.ini\n"
    assert shop.run("diff", "--", "__default__/conf/") == only
    assert shop.run("diff", "HEAD", "--", "__default__/conf") == only
    assert shop.run("diff", "--", "absent") == ""
    shop.run("diff", "--name-only", "-p", code=2)
    shop.run("diff", "a", "b", "c", code=2)
    shop.run("diff", "--", "../x", code=2)


def test_sizes_tell_how_much_of_a_large_file_differs(shop: Shop) -> None:
    with open(shop.tree / "big.db", "wb") as out:
        out.truncate(2**30)
        for offset in range(0, 2**30, 2**25):
            out.seek(offset)
            out.write(os.urandom(4096))
    shop.run("commit", "-m", "second")
    with open(shop.tree / "big.db", "r+b") as out:
        out.seek(2**29)
        out.write(os.urandom(4096))
    (shop.tree / "conf" / "x.ini").write_text("x = 22\n")
    assert shop.run("diff", "--stat") == (
        "* __default__/big.db (1.00 GiB -> 1.00 GiB, at most 128.00 kiB differ)\n"
        "* __default__/conf/x.ini (6 B -> 7 B)\n"
        "2 changed; +1 B; at most 128.01 kiB differ\n"
    )
    assert [change["differing_bytes_max"] for change in shop.json("--stat")] == [131072, 7]
    began = time.monotonic()
    assert "large file, not shown" in shop.run("diff", "-p") or "binary file" in shop.run(
        "diff", "-p"
    )
    assert time.monotonic() - began < 30


def test_patch_and_metadata(shop: Shop) -> None:
    (shop.tree / "a.txt").write_text("one\n\x1b[31m2\u202e\r\nthree\n")
    (shop.tree / "link").unlink()
    os.symlink("conf", shop.tree / "link")
    (shop.tree / "conf" / "x.ini").chmod(0o600)
    printed = shop.run("diff", "-p", "--summary")
    assert (
        "--- a/__default__/a.txt\n+++ b/__default__/a.txt\n@@ -1,3 +1,3 @@\n one\n-two\n"
        "+\\x1b[31m2\\u202e\\r\n three\n"
    ) in printed
    assert "* __default__/link\n" in printed and "  symlink to a.txt -> conf\n" in printed
    assert "* __default__/conf/x.ini\n  mode 0644 -> 0600\n" in printed
    assert "  time 20" in printed
    assert "mode 0644 -> 0600" in shop.run("diff", "-v")
    assert "mode" not in shop.run("diff")
    assert "@@ -2 +2 @@\n-two\n" in shop.run("diff", "-U", "0")
    changes = {change["path"]: change for change in shop.json("-p", "--summary")}
    assert changes["__default__/conf/x.ini"]["metadata"] == {"mode": ["0644", "0600"]}
    content = changes["__default__/a.txt"]["content"]
    assert isinstance(content, dict) and content["driver"] == "text"
    assert content["lines"][2:4] == ["-two", "+\x1b[31m2\u202e\r"]
    assert changes["__default__/link"]["new_link_target"] == "conf"


def test_the_printed_patch_applies(shop: Shop, tmp_path: Path) -> None:
    (shop.tree / "a.txt").write_text("zero\none\nthree\nfour")
    (shop.tree / "new.txt").write_text("new\n")
    (shop.tree / "conf" / "x.ini").unlink()
    shop.run("commit", "-m", "second")
    patch = shop.run("diff", "HEAD^", "HEAD", "-p")
    shop.run("reset", "--hard", "HEAD^")
    work = tmp_path / "work" / "__default__"
    work.parent.mkdir(exist_ok=True)
    subprocess.run(["cp", "-a", str(shop.tree), str(work)], check=True)
    done = subprocess.run(
        ["git", "apply", "-p1", "-"], input=patch.encode(), cwd=work.parent, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert (work / "a.txt").read_text() == "zero\none\nthree\nfour"
    assert (work / "new.txt").read_text() == "new\n"
    assert not (work / "conf" / "x.ini").exists()


def test_rows(shop: Shop) -> None:
    def execute(*statements: str) -> None:
        connection = sqlite3.connect(shop.tree / "app.db", isolation_level=None)
        for statement in statements:
            connection.execute(statement)
        connection.close()

    execute("CREATE TABLE t (id INTEGER PRIMARY KEY, v)", "INSERT INTO t VALUES (1, 'a')")
    shop.run("commit", "-m", "second")
    (shop.tree / "a.txt").write_text("other\n")
    execute("UPDATE t SET v = 'b' || char(10, 27) WHERE id = 1", "INSERT INTO t VALUES (2, x'ff')")
    assert shop.run("diff", "--rows").splitlines() == [
        "* __default__/a.txt",
        "* __default__/app.db",
        "  table t: 1 added, 0 removed, 1 changed",
        "    * (id=1) v: 'a' -> 'b\\n\\x1b'",
        "    + (id=2) v=x'ff' (1 bytes)",
    ]
    assert "  (1 more)" in shop.run("diff", "--rows", "--rows-max", "1")
    assert "    * (id=1) v:" in shop.run("diff", "-p")
    (_, change) = shop.json("--rows")
    content = change["content"]
    assert isinstance(content, dict) and content["driver"] == "rows"
    assert content["tables"][0]["rows"][1]["new"] == [2, {"blob": "/w=="}]
    assert os.listdir(shop.base / "store" / "tmp") == []


# --- the user's own commands ---------------------------------------------------------------------


def test_a_configured_command_shows_its_files(shop: Shop) -> None:
    shop.configure(
        "[diff.ini]\npatterns = [\"*.ini\"]\n"
        "command = '''printf '%s\\n' \"$DM_PATH\"; printf '\\033[31m'; cat \"$DM_OLD\" \"$DM_NEW\"'''\n"
    )  # fmt: skip
    (shop.tree / "conf" / "x.ini").write_text("x = 2\n")
    (shop.tree / "a.txt").write_text("other\n")
    printed = shop.run("diff", "-p")
    assert "* __default__/conf/x.ini\n__default__/conf/x.ini\n\\x1b[31mx = 1\nx = 2\n" in printed
    assert "+other\n" in printed
    (change,) = shop.json("-p", "--", "__default__/conf")
    assert change["content"] == {
        "driver": "ini",
        "lines": ["__default__/conf/x.ini", "\x1b[31mx = 1", "x = 2"],
    }
    assert "x = 1" not in shop.run("diff"), "without -p nothing is run"


def test_a_command_that_fails_is_told(shop: Shop) -> None:
    shop.configure('[diff.ini]\npatterns = ["*.ini"]\ncommand = "echo no such key >&2; exit 9"\n')
    (shop.tree / "conf" / "x.ini").write_text("x = 2\n")
    shop.run("diff", "-p", code=1)
    assert "driver ini exited 9: no such key" in shop.said
    shop.run("diff", "-p", "--json", code=1)
    assert json.loads(shop.said.splitlines()[-1])["code"] == "driver"


def test_configuration_in_a_tree_is_a_file_like_any_other(shop: Shop) -> None:
    """Commands come from the user's own configuration alone, never out of a dot."""
    witness = shop.base / "witness"
    text = f'[diff.evil]\npatterns = ["*"]\ncommand = "touch {witness}"\n'
    places = ("config.toml", ".config/dm/config.toml", ".dm/config.toml", ".dmconfig")
    for place in places:
        path = shop.tree / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        path.chmod(0o600)
    (shop.tree / ".gitattributes").write_text("* diff=evil\n")
    subprocess.run(
        ["dm", "diff", "-p"], env=shop.environment, cwd=shop.tree, capture_output=True, check=True
    )
    shop.run("commit", "-m", "second")
    assert "touch" in shop.run("diff", "HEAD^", "HEAD", "-p")
    shop.run("diff", "HEAD^", "HEAD", "--rows", "--stat", "--summary")
    assert not witness.exists()
