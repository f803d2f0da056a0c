"""`dm log`, `dm blame`, `dm branch --contains` and revisions, through the installed command."""

import os

import pytest

from tests.support.cluster import Cluster


@pytest.fixture
def shop(cluster: Cluster) -> Cluster:
    """Three commits on master, the second on stock alone; one on topic from the first."""
    cluster.init("shop", {"stock.txt": "1", "notes/a": "x"})
    cluster.run("commit", "-m", "first", "-d", "ticket=1")
    cluster.run("checkout", "-b", "topic")
    cluster.write("shop", {"notes/a": "y"})
    cluster.run("commit", "-m", "on topic", env={"DM_AUTHOR": "Bob <bob@test>"})
    cluster.run("checkout", "master")
    cluster.write("shop", {"stock.txt": "22"})
    cluster.run("commit", "-m", "second", "-d", "ticket=2")
    cluster.write("shop", {"notes/b": "z"})
    cluster.run("commit", "-m", "third")
    return cluster


def subjects(cluster: Cluster, *arguments: str) -> list[str]:
    """Messages that `dm log` lists, oldest first."""
    return [commit["message"] for commit in cluster.run("log", "--json", *arguments).json()]


def test_log_of_paths_ranges_and_filters(shop: Cluster) -> None:
    assert subjects(shop) == ["first", "second", "third"]
    assert subjects(shop, "--", "__default__/stock.txt") == ["first", "second"]
    assert subjects(shop, "--", "__default__/notes/") == ["first", "third"]
    assert subjects(shop, "-n", "1", "--", "__default__/notes", "__default__/stock.txt") == [
        "third"
    ]
    assert subjects(shop, "--", "__default__/nothing") == []
    assert subjects(shop, "topic..") == ["second", "third"]
    assert subjects(shop, "master", "topic", "^HEAD~2", "--author", "Bob") == ["on topic"]
    assert subjects(shop, "topic...master", "--grep", "sec") == ["second"]
    assert subjects(shop, "--meta", "ticket") == ["first", "second"]
    assert subjects(shop, "--meta", "ticket=2") == ["second"]
    assert subjects(shop, "--since", "2 hours ago", "--no-merges") == ["first", "second", "third"]
    assert subjects(shop, "--until", "2 hours ago") == [] == subjects(shop, "--merges")
    assert subjects(shop, "@{-1}") == ["first", "on topic"]
    assert subjects(shop, ":/on top") == ["first", "on topic"]


def test_log_as_text(shop: Cluster) -> None:
    graph = shop.run("log", "--graph", "--oneline", "master", "topic").stdout
    assert graph.count("*") == 4 and "|\\" in graph
    filtered = shop.run("log", "--graph", "--oneline", "--grep", "ir").stdout.splitlines()
    assert [line[0] for line in filtered] == [
        "*",
        "*",
    ]  # one line of history, past what is left out
    assert "|" not in "".join(filtered)
    stat = shop.run("log", "--stat", "-n", "2").stdout
    assert "1 changed; +1 B" in stat and "1 added; +1 B" in stat
    (last,) = shop.run("log", "--stat", "-n", "1", "--json").json()
    assert last["stat"]["bytes_grown"] == 1 and last["stat"]["files"] >= 1
    (other,) = shop.run("log", "-n1", "--json", "--stat", "--", "__default__/stock.txt").json()
    assert other["stat"] == {"files": 1, "bytes_written": 2, "bytes_grown": 1}


def test_blame(shop: Cluster) -> None:
    def blame(*arguments: str) -> dict[str, str]:
        found = shop.run("blame", "--json", *arguments).json()
        return {line["path"]: line["message"] for line in found}

    assert blame() == {"__default__": "third"}
    assert blame("--", "__default__") == {
        "__default__/notes": "third",
        "__default__/stock.txt": "second",
    }
    assert blame("-r", "topic") == {
        "__default__/notes/a": "on topic",
        "__default__/stock.txt": "first",
    }
    (line,) = shop.run("blame", "topic", "--", "__default__/notes/a").stdout.splitlines()
    tip = shop.run("log", "topic", "-n1", "--json").json()[0]["id"]
    assert line.startswith(f"{tip[:12]}  ") and line.endswith("Bob <bob@test>  __default__/notes/a")


def test_branches_by_what_they_hold(shop: Cluster) -> None:
    def names(*arguments: str) -> list[str]:
        return [branch["name"] for branch in shop.run("branch", "--json", *arguments).json()]

    shop.run("branch", "old", "HEAD~2")
    assert names("--contains", "HEAD~2") == ["master", "old", "topic"]
    assert names("--no-contains", "topic") == ["master", "old"]
    assert names("--merged") == ["master", "old"] and names("--no-merged") == ["topic"]
    assert names("--merged", "topic") == ["old", "topic"]
    listed = shop.run("branch", "-v").stdout.splitlines()
    assert listed[0].startswith("* master ") and listed[0].endswith(" 3 commits")
    assert listed[1].endswith(" 1 commit")


BAD_QUESTIONS = (
    (("log", "--", "../x"), 2, "usage"),
    (("log", "--", "__default__//x"), 2, "usage"),
    (("log", "--since", "soon"), 2, "usage"),
    (("log", "--until", ""), 2, "usage"),
    (("log", "HEAD^^^^"), 10, "no-revision"),
    (("log", "HEAD" + "^" * 300), 2, "usage"),
    (("log", "^nope"), 10, "no-revision"),
    (("log", "@{-7}"), 10, "no-revision"),
    (("log", "master@{-1}"), 2, "usage"),
    (("log", ":/"), 2, "usage"),
    (("log", ":/never said"), 10, "no-revision"),
    (("log", "master^{tree}"), 2, "usage"),
    (("log", "-n", "-1"), 2, "usage"),
    (("blame", "nope"), 10, "no-revision"),
    (("blame", "--", "__default__/nope"), 10, "no-path"),
    (("blame", "--", ".."), 2, "usage"),
    (("blame", "HEAD", "HEAD"), 2, "usage"),
    (("branch", "--contains", "nope"), 10, "no-revision"),
    (("branch", "--merged", "HEAD~9"), 10, "no-revision"),
    (("branch", "new", "--contains", "HEAD"), 2, "usage"),
    (("branch", "-d", "topic", "--merged"), 2, "usage"),
)


def test_bad_questions_are_refused(shop: Cluster) -> None:
    before = shop.run("branch", "--json").stdout
    for (name, *words), code, error in BAD_QUESTIONS:
        result = shop.run(name, "--json", *words, check=False)
        assert result.code == code, result.describe()
        assert result.error()["code"] == error and result.stdout == "", result.describe()
        assert "Traceback" not in result.stderr
    assert shop.run("branch", "--json").stdout == before


def test_paths_that_are_no_text(shop: Cluster) -> None:
    name = os.fsdecode(b"no\xfftext")
    shop.write("shop", {name: "1"})
    shop.run("commit", "-m", "odd")
    assert subjects(shop, "--", f"__default__/{name}") == ["odd"]
    assert subjects(shop, "--", os.fsdecode(b"__default__/other\xfe")) == []
    (line,) = shop.run("blame", "--", f"__default__/{name}").stdout.splitlines()
    assert line.endswith("__default__/no\\xfftext")
    refused = shop.run("log", name, check=False)
    assert refused.code == 2 and "not UTF-8" in refused.stderr
