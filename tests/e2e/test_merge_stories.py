"""Merging as a user sees it: Dolt's story of a commit graph, and DataKit's merge scenarios by
their names. Where our ways differ from theirs, the test says what happens instead."""

import sqlite3
from pathlib import Path

from tests.support.cluster import Cluster

AT = "__default__"


def branch_off(cluster: Cluster, name: str, files: dict[str, str | bytes | None]) -> str:
    """Make a branch at HEAD, commit `files` (None removes) there, and come back to master."""
    cluster.run("checkout", "-b", name)
    tip = change(cluster, files, f"on {name}")
    cluster.run("checkout", "master")
    return tip


def change(cluster: Cluster, files: dict[str, str | bytes | None], message: str) -> str:
    """Commit changes of the current branch's tree."""
    tree = cluster.tree("app")
    for name, content in files.items():
        path = tree / name
        if content is None:
            path.unlink()
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return cluster.commit(message)


def conflicts(cluster: Cluster) -> dict[str, str]:
    """Open conflicts: reason by path within the default subdot."""
    listed = cluster.run("conflicts", "--json").json()
    return {
        row["path"].removeprefix(f"{AT}/"): row["reason"] for row in listed if not row["resolved"]
    }


def parents(cluster: Cluster, revision: str = "HEAD") -> list[str]:
    log = cluster.run("log", "--json", "-n", "1", revision).json()
    found: list[str] = log[-1]["parents"]
    return found


def test_dolt_story(cluster: Cluster) -> None:
    # init commit
    cluster.init("app", {"people.csv": "1,ada\n2,grace\n", "notes": "\0 first"})
    first = cluster.commit("init")
    # HEAD and WORKING: what is committed and what is not yet
    cluster.write("app", {"people.csv": "1,ada\n2,grace\n3,edsger\n"})
    assert cluster.run("cat", f"HEAD:{AT}/people.csv").stdout == "1,ada\n2,grace\n"
    assert cluster.files("app")["people.csv"].endswith("3,edsger\n")
    assert f"* {AT}/people.csv" in cluster.run("status").stdout
    # second commit
    second = cluster.commit("second")
    assert parents(cluster) == [first]
    # branch, commits on both
    theirs = branch_off(cluster, "other", {"places.csv": "1,london\n"})
    ours = change(cluster, {"people.csv": "1,ada l.\n2,grace\n3,edsger\n"}, "on master")
    # merge with two parents
    merged = cluster.run("merge", "other").stdout.strip()
    assert parents(cluster, merged) == [ours, theirs]
    assert cluster.messages()[-1] == "merge other into master"
    assert cluster.files("app")["places.csv"] == "1,london\n"
    assert cluster.files("app")["people.csv"].startswith("1,ada l.\n")
    assert cluster.run("merge", "other").stdout == "Already up to date.\n"
    # branch deleted: its commits stay in the history of master
    cluster.run("branch", "-d", "other")
    assert cluster.branches() == ["master"]
    assert second in cluster.run("log").stdout and theirs in cluster.run("log").stdout
    # conflict found
    branch_off(cluster, "third", {"notes": "\0 theirs"})
    change(cluster, {"notes": "\0 ours"}, "other words")
    refused = cluster.run("merge", "third", check=False)
    assert (refused.code, refused.stdout) == (
        15,
        f"C {AT}/notes: changed on both sides; exists in ours, theirs, base\n",
    )
    cluster.refused("commit", "-m", "too early", code=15, saying="1 conflict to resolve")
    cluster.refused("checkout", "third", code=15, saying="dm merge --abort")
    cluster.refused("merge", "--continue", code=15, saying="notes")
    assert cluster.run("status").stdout.startswith(f"C {AT}/notes\n")
    assert cluster.run("status", "--json").json()["merge"]["kind"] == "merge"
    # and resolved
    cluster.run("resolve", f"{AT}/notes", "--theirs")
    summary = cluster.run("merge", "--continue", "--json", "-m", "joined").summary()
    assert parents(cluster) == [cluster.tip("HEAD^"), cluster.tip("third")]
    assert (summary["outcome"], cluster.messages()[-1]) == ("merged", "joined")
    assert cluster.files("app")["notes"] == "\0 theirs"
    assert cluster.run("status", "--json").json()["clean"]
    cluster.run("fsck")


def test_parents(cluster: Cluster) -> None:
    """DataKit 8. Parents are written by merges alone here: there is no file to edit them in, so
    re-parenting is `reset` and `cherry-pick`, and an id that is none is refused at once."""
    cluster.init("app")
    assert cluster.run("log", "--json").json() == []
    first = change(cluster, {"file": "one"}, "first")
    assert parents(cluster) == []
    second = change(cluster, {"file": "two"}, "second")
    assert parents(cluster) == [first]
    a = branch_off(cluster, "a", {"a": "1"})
    b = branch_off(cluster, "b", {"b": "1"})
    cluster.run("merge", "a", "--no-ff")
    one = cluster.tip()
    assert parents(cluster) == [second, a]
    cluster.run("merge", "b")
    assert parents(cluster) == [one, b]
    cluster.refused("merge", "0123456789abcdef" * 4, code=10)
    cluster.refused("merge", "not a revision", code=2)
    cluster.refused("merge", code=2)
    assert parents(cluster) == [one, b]


def test_merge(cluster: Cluster) -> None:
    """DataKit 9. Ours, theirs and base lie beside the path instead of in directories of their own."""
    cluster.init("app", {"file": "\0 from-base"})
    base = cluster.commit("base")
    cluster.refused("merge", "--ff-only", "f" * 64, code=10)
    theirs = branch_off(cluster, "theirs", {"file": "\0 from-theirs", "new": "theirs"})
    assert cluster.run("merge", "theirs", "--dry-run").stdout == f"* {AT}/file\n+ {AT}/new\n"
    ours = change(cluster, {"file": "\0 from-ours"}, "ours")
    cluster.refused("merge", "--ff-only", "theirs", code=14)
    assert cluster.run("merge", "theirs", check=False).code == 15
    assert cluster.files("app") == {
        "file": "\0 from-ours",
        "file~ours": "\0 from-ours",
        "file~theirs": "\0 from-theirs",
        "file~base": "\0 from-base",
        "new": "theirs",
    }
    cluster.write("app", {"file": "\0 ours+theirs+base"})
    cluster.run("resolve", "--all", "--as-is")
    merged = cluster.commit("merged")
    assert parents(cluster, merged) == [ours, theirs]
    assert cluster.files("app") == {"file": "\0 ours+theirs+base", "new": "theirs"}
    assert base in cluster.run("log").stdout


def test_merge_metadata(cluster: Cluster) -> None:
    """DataKit 10. Mode and kind of a file on three sides: an executable and a link against a
    plain file; fields that one side alone changed merge, which DataKit could not do."""
    cluster.init("app", {"a": "\0 a", "b": "\0 b", "c": "\0 c"})
    cluster.commit("base")
    cluster.run("checkout", "-b", "theirs")
    tree = cluster.tree("app")
    (tree / "a").chmod(0o755)
    (tree / "b").unlink()
    (tree / "b").symlink_to("target")
    (tree / "c").chmod(0o600)
    cluster.commit("theirs")
    cluster.run("checkout", "master")
    tree = cluster.tree("app")
    (tree / "a").write_text("\0 changed")
    (tree / "b").chmod(0o755)
    (tree / "c").chmod(0o640)
    cluster.commit("ours")
    assert cluster.run("merge", "theirs", check=False).code == 15
    assert conflicts(cluster) == {
        "b": "file in ours, symlink in theirs",
        "c": "mode changed on both sides",
    }
    assert ((tree / "a").stat().st_mode & 0o777, (tree / "a").read_text()) == (0o755, "\0 changed")
    assert (tree / "b~theirs").is_symlink()
    cluster.write("app", {"b": "resolved"})
    (tree / "b").chmod(0o700)
    cluster.run("resolve", f"{AT}/b", "--as-is")
    cluster.run("resolve", f"{AT}/c", "--theirs")
    cluster.run("merge", "--continue")
    assert (tree / "b").stat().st_mode & 0o777 == 0o700
    assert (tree / "c").stat().st_mode & 0o777 == 0o600
    assert sorted(path.name for path in tree.iterdir()) == ["a", "b", "c"]


def test_merge_empty(cluster: Cluster) -> None:
    """DataKit 11: merging into a branch without commits, and one without commits into another."""
    cluster.init("app", {"file": "from-theirs"})
    tip = cluster.commit("theirs")
    cluster.run("init", "empty")
    cluster.refused("merge", "nothing", code=10)
    cluster.refused("merge", "HEAD", code=10, saying="no commits yet")
    cluster.run("switch", "app")
    cluster.run("branch", "fresh")
    assert cluster.run("merge", "fresh").stdout == "Already up to date.\n"
    assert cluster.tip() == tip


def test_conflicts(cluster: Cluster) -> None:
    """DataKit 12: every way in which two sides can meet, by DataKit's names."""
    both: dict[str, str | bytes | None] = {
        "edit-edit": "\0 base",
        "edit-same": "\0 base",
        "same-edit": "\0 base",
        "delete-same": "\0 base",
        "same-delete": "\0 base",
        "delete-edit": "\0 base",
        "edit-delete": "\0 base",
        "dir-to-file/was": "\0 base",
    }
    cluster.init("app", {name: data for name, data in both.items() if data is not None})
    cluster.commit("base")
    theirs = branch_off(
        cluster,
        "theirs",
        {
            "edit-edit": "\0 theirs",
            "same-edit": "\0 theirs",
            "same-delete": None,
            "delete-edit": "\0 theirs",
            "edit-delete": None,
            "add-add-same": "\0 same",
            "add-add-different": "\0 theirs",
            "file-to-dir": "\0 a file in theirs",
            "dir-to-file/was": "\0 theirs",
        },
    )
    tree = cluster.tree("app")
    for name in ("delete-same", "delete-edit", "dir-to-file/was"):
        (tree / name).unlink()
    (tree / "dir-to-file").rmdir()
    ours = change(
        cluster,
        {
            "edit-edit": "\0 ours",
            "edit-same": "\0 ours",
            "edit-delete": "\0 ours",
            "add-add-same": "\0 same",
            "add-add-different": "\0 ours",
            "file-to-dir/now": "\0 a directory in ours",
            "dir-to-file": "\0 a file in ours",
        },
        "ours",
    )
    assert cluster.run("merge", "theirs", check=False).code == 15
    assert conflicts(cluster) == {
        "add-add-different": "added on both sides",
        "delete-edit": "deleted by ours, changed by theirs",
        "dir-to-file": "file in ours, directory in theirs",
        "edit-delete": "deleted by theirs, changed by ours",
        "edit-edit": "changed on both sides",
        "file-to-dir": "directory in ours, file in theirs",
    }
    cluster.refused("commit", "-m", "no", code=15, saying="6 conflicts to resolve")
    found = cluster.files("app")
    assert found["dir-to-file~theirs/was"] == "\0 theirs"
    assert found["file-to-dir~theirs"] == "\0 a file in theirs"
    assert found["edit-same"] == "\0 ours" and found["same-edit"] == "\0 theirs"
    assert "delete-same" not in found and "same-delete" not in found
    # resolved by removal
    (tree / "add-add-different").unlink()
    cluster.run("resolve", f"{AT}/add-add-different", "--as-is")
    # and by theirs
    cluster.run("resolve", *(f"{AT}/{name}" for name in ("edit-edit", "edit-delete")), "--theirs")
    cluster.run("resolve", f"{AT}/file-to-dir", f"{AT}/dir-to-file", "--theirs")
    cluster.refused("resolve", f"{AT}/same-edit", "--theirs", code=10, saying="no conflict")
    cluster.run("resolve", "--all", "--theirs")
    cluster.run("merge", "--continue")
    assert parents(cluster) == [ours, theirs]
    assert cluster.files("app") == {
        "add-add-same": "\0 same",
        "delete-edit": "\0 theirs",
        "dir-to-file/was": "\0 theirs",
        "edit-edit": "\0 theirs",
        "edit-same": "\0 ours",
        "file-to-dir": "\0 a file in theirs",
        "same-edit": "\0 theirs",
    }


def test_pull_merges_what_both_sides_committed(pair: tuple[Cluster, Cluster]) -> None:
    near, far = pair
    near.init("app", {"a": "\0 1", "b": "\0 1"})
    near.commit("base")
    near.run("push", "far", "app")
    far.run("switch", "app")
    theirs = change(far, {"a": "\0 2"}, "over there")
    ours = change(near, {"b": "\0 2"}, "here")
    near.refused("pull", "far", "app", code=14)
    near.run("pull", "far", "app", "--merge")
    assert parents(near) == [ours, theirs]
    assert near.messages()[-1] == "merge far/master into master"
    assert near.files("app") == {"a": "\0 2", "b": "\0 2"}
    near.run("push", "far", "app")
    change(far, {"a": "\0 3"}, "again")
    change(near, {"a": "\0 4"}, "again")
    refused = near.run("pull", "far", "app", "--merge", "--json", check=False)
    assert (refused.code, refused.summary()["conflicts"][0]["path"]) == (15, f"{AT}/a")
    # the branch is being merged into: it takes nothing else
    near.refused("pull", "far", "app", code=15, saying="under way")
    near.run("merge", "--abort")
    assert near.files("app")["a"] == "\0 4"


def test_a_push_into_a_merging_branch_is_refused(pair: tuple[Cluster, Cluster]) -> None:
    near, far = pair
    near.init("app", {"a": "\0 1"})
    near.commit("base")
    near.run("push", "far", "app")
    far.run("switch", "app")
    branch_off(far, "other", {"a": "\0 2"})
    tip = change(far, {"a": "\0 3"}, "ours")
    near.run("pull", "far", "app")
    assert far.run("merge", "other", check=False).code == 15
    change(near, {"b": "\0 4"}, "more")
    near.refused("push", "far", "app", code=18, saying="under way")
    far.run("resolve", "--all", "--ours")
    near.refused("push", "far", "app", code=18, saying="under way")
    assert far.tip() == tip
    far.run("merge", "--continue")
    near.run("pull", "far", "app", "--merge")
    near.run("push", "far", "app")


def shop(path: Path, *statements: str) -> None:
    with sqlite3.connect(path) as db:
        for statement in statements:
            db.execute(statement)
    db.close()


def test_rows_of_databases_merge_and_conflict_one_by_one(cluster: Cluster) -> None:
    cluster.init("app")
    shop(
        cluster.tree("app") / "shop.db",
        "CREATE TABLE goods (id INTEGER PRIMARY KEY, name TEXT, price INTEGER)",
        "INSERT INTO goods VALUES (1, 'apple', 10), (2, 'pear', 20), (3, 'plum', 30)",
    )
    cluster.commit("base")
    cluster.run("checkout", "-b", "other")
    shop(
        cluster.tree("app") / "shop.db",
        "UPDATE goods SET price = 11 WHERE id = 1",
        "UPDATE goods SET price = 21 WHERE id = 2",
        "UPDATE goods SET price = 31 WHERE id = 3",
        "INSERT INTO goods VALUES (4, 'fig', 40)",
    )
    cluster.commit("theirs")
    cluster.run("checkout", "master")
    database = cluster.tree("app") / "shop.db"
    shop(
        database,
        "UPDATE goods SET price = 22 WHERE id = 2",
        "UPDATE goods SET price = 33 WHERE id = 3",
    )
    cluster.commit("ours")
    assert cluster.run("merge", "other", check=False).code == 15
    assert conflicts(cluster) == {"shop.db": "2 rows changed on both sides"}
    shown = cluster.run("conflicts", "--rows").stdout
    assert "goods [2]: changed twice" in shown
    assert 'theirs  [2, "pear", 21]' in shown
    cluster.run("resolve", f"{AT}/shop.db", "--row", "goods", "2", "--theirs")
    cluster.refused(*("resolve", f"{AT}/shop.db", "--row", "goods", "2", "--theirs"), code=10)
    cluster.refused("merge", "--continue", code=15)
    cluster.run("resolve", f"{AT}/shop.db", "--row", "goods", "[3]", "--base")
    assert conflicts(cluster) == {}
    for side in ("--ours", "--base"):  # decided again
        again = cluster.run("resolve", f"{AT}/shop.db", "--row", "goods", "[3]", side, "--json")
        assert (again.summary()["conflicts_left"], again.summary()["rows_left"]) == (0, 0)
    cluster.run("merge", "--continue")
    with sqlite3.connect(database) as db:
        assert db.execute("SELECT id, price FROM goods ORDER BY id").fetchall() == [
            (1, 11),
            (2, 21),
            (3, 30),
            (4, 40),
        ]
        assert db.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert [path.name for path in cluster.tree("app").iterdir()] == ["shop.db"]


def test_bad_requests_change_nothing(cluster: Cluster) -> None:
    cluster.init("app", {"a": "1"})
    cluster.commit("base")
    for words in (
        ("merge",),
        ("merge", "HEAD", "--continue"),
        ("merge", "--abort", "-m", "x"),
        ("merge", "HEAD", "--ours", "--theirs"),
        ("merge", "HEAD", "--ff-only", "--no-ff"),
        ("resolve", f"{AT}/a"),
        ("resolve", "--theirs"),
        ("resolve", f"{AT}/a", "--theirs", "--ours"),
        ("resolve", "--all", f"{AT}/a", "--theirs"),
        ("resolve", "--all", "--theirs", "--row", "t", "1"),
    ):
        cluster.refused(*words, code=2)
    cluster.refused("merge", "--continue", code=10, saying="no merge")
    cluster.refused("merge", "--abort", code=10)
    cluster.refused("resolve", "--all", "--theirs", code=10)
    assert cluster.run("conflicts", "--json").json() == []
    assert cluster.run("conflicts").stdout == ""
