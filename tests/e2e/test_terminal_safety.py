"""Whatever names, messages, authors and servers say: no output holds a raw control character, and
one record stays one line."""

import json
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from dmsync.errors import NotFound
from dmsync.surfaces.cli.main import print_error
from dmsync.surfaces.cli.output import escape_line, escape_name, escape_text
from dmsync.wire.failures import error_from_failure
from dmsync.wire.messages import Failure
from tests.support.cluster import Cluster, MakeCluster, Result

HOSTILE: Final = [
    "\x1b[2J\x1b]0;owned\x07",
    "\x9b31m",
    "\x90q\x9c",
    "a\rb",
    "a\x08\x08b",
    "\x7f",
    "\u202egnp.exe",
    "\u2066x\u2069",
    "a\u2028b\u2029c",
    "a\x85b",
    "\x0b\x0c\x1c\x1d\x1e",
    "\ufeff\u200b\u00ad",
    "\U000e0041",
    "x\x1b%G",
]
MESSAGE: Final = "subject " + " ".join(HOSTILE) + "\n\ncommit 0000 (fake)\ndm: error: fake"
NAMES: Final = [text.encode() for text in HOSTILE] + [
    b"new\nline",
    b"tab\tname",
    b"\xff\xfe raw",
    b"\xc2",
    b"\x9b raw C1",
    b"dm: error: \nfake",
]


def unsafe(text: str) -> list[str]:
    """Characters that a terminal would act on, beside the newlines and tabs between fields."""
    return [
        c
        for c in text
        if c not in "\n\t" and (unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp", "Cs", "Co"))
    ]


def check(result: Result) -> None:
    for stream in (result.stdout, result.stderr):
        assert not unsafe(stream), (result.arguments, unsafe(stream))
    assert "Traceback" not in result.stderr, result.describe()


@pytest.fixture
def haunted(cluster: Cluster) -> Cluster:
    """A dot whose every text is hostile: names, links, attributes, messages, authors, metadata."""
    cluster.environment["DM_AUTHOR"] = f"Eve {HOSTILE[0]}{HOSTILE[5]} <e@x>"
    cluster.init("app", {"plain": "x"})
    fill(cluster.tree("app"), b"1")
    cluster.commit(MESSAGE, "-d", f"key={HOSTILE[0]}\nfake: yes")
    fill(cluster.tree("app"), b"2")
    (cluster.tree("app") / "text.txt").write_text("\n".join(HOSTILE))
    cluster.commit("second " + HOSTILE[6])
    (cluster.tree("app") / "text.txt").write_text("other\n" + "\n".join(reversed(HOSTILE)))
    return cluster


def fill(tree: Path, content: bytes) -> None:
    for name in NAMES:
        path = os.path.join(os.fsencode(tree), name)
        with open(path, "wb") as file:
            file.write(content * 10)
        os.setxattr(path, b"user." + name.replace(b"\0", b""), content)
        link = os.path.join(os.fsencode(tree), b"link-" + name)
        if not os.path.lexists(link):
            os.symlink(b"to " + name, link)


COMMANDS: Final = [
    ["list"],
    ["status"],
    ["diff"],
    ["diff", "--stat", "HEAD~1"],
    ["diff", "HEAD~1", "HEAD"],
    ["log"],
    ["log", "--graph"],
    ["log", "--stat"],
    ["show", "HEAD"],
    ["show", "--stat", "HEAD~1"],
    ["ls", "HEAD:__default__"],
    ["ls", "-l", "HEAD:__default__"],
    ["blame", "HEAD"],
    ["dot", "show", "app"],
    ["branch"],
    ["reflog"],
    ["op", "log"],
    ["op", "show", "3"],
    ["tag"],
    ["verify", "HEAD"],
    ["stash", "list"],
    ["remote", "-v"],
    ["transfer", "list"],
    ["fsck"],
    ["prune", "--keep-last", "1", "-n"],
    ["-v", "-v", "status"],
    ["no\x1b[31msuch"],
    ["show", "no\x1b[31msuch\nrevision"],
    ["show", "HEAD:\x9b\n"],
    ["cat", "HEAD:\x1bx\nfake"],
    ["checkout", "\u202ebranch"],
    ["restore", "HEAD", "--", "\x1b\n"],
    ["init", "\x1b[31m"],
    ["clone", "\x1b[31m\n", "x"],
    ["remote", "add", "r", "ssh://\x1b[31m\n"],
    ["log", "--dot", "\x1b[31m"],
    ["resolve", "\x1b\n", "--ours"],
    ["bundle", "verify", "/no/\x1b[31m\n"],
    ["export", "HEAD", "/no\x1b\n/such"],
    ["commit", "-m", "x", "-d", "\x1b\n"],
]


def test_no_command_prints_what_a_terminal_would_act_on(haunted: Cluster) -> None:
    for words in COMMANDS:
        for options in ([], ["--json"]):
            check(haunted.run(*words, *options, check=False))


def test_one_record_stays_one_line(haunted: Cluster) -> None:
    commits = len(haunted.run("log", "--json").json())
    assert len(haunted.run("log", "--oneline", check=False).stdout.splitlines()) in (0, commits)
    names = haunted.run("ls", "HEAD:__default__").stdout.splitlines()
    assert len(names) == 2 * len(NAMES) + 2
    changed = haunted.run("status").stdout.splitlines()
    assert [line for line in changed if "text.txt" in line], changed
    refused = haunted.run("show", "no\nsuch\nrevision", check=False).stderr
    assert all(line.startswith("dm: ") for line in refused.splitlines()), refused


def test_changing_commands_say_it_as_safely(haunted: Cluster) -> None:
    for words in (
        ["stash", "push", "-m", MESSAGE],
        ["stash", "list"],
        ["stash", "pop"],
        ["tag", "v1", "-m", MESSAGE],
        ["tag", "-l"],
        ["show", "v1"],
        ["reset", "--hard", "HEAD~1"],
        ["undo"],
        ["revert", "HEAD", "--discard"],
        ["op", "log"],
    ):
        check(haunted.run(*words, check=False))


def test_what_a_peer_names_is_shown_as_safely(haunted: Cluster, make_cluster: MakeCluster) -> None:
    near = make_cluster("near")
    near.run("init", "other")
    check(near.run("clone", str(haunted.home), "app"))
    for words in (["log"], ["ls", "HEAD:__default__"], ["status"], ["list"]):
        check(near.run(*words, "--dot", "app"))


def texts() -> Iterator[str]:
    for first in HOSTILE:
        yield first
        for second in HOSTILE:
            yield f"{first} and {second}\n{first}\tend"


def test_what_a_server_says_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    for text in texts():
        for code in ("not-found", "no-such-code", text[:20]):
            told = error_from_failure(Failure(code, text, text, json.dumps({"fact": text}), False))
            for as_json in (False, True):
                print_error(told, as_json=as_json)
                printed = capsys.readouterr().err
                assert not unsafe(printed), printed
                assert len(printed.splitlines()) == (1 if as_json else 2), printed


def test_errors_of_our_own_are_as_safe(capsys: pytest.CaptureFixture[str]) -> None:
    for text in texts():
        print_error(NotFound(f"no {text}", hint=text, fact=text), as_json=False, subject=text)
        printed = capsys.readouterr().err
        assert not unsafe(printed) and len(printed.splitlines()) == 2, printed


def test_every_character_is_escaped_that_should_be() -> None:
    for point in [*range(0x3000), *range(0xD7FF, 0x11000), *range(0xE0000, 0xE0100)]:
        character = chr(point)
        for escape in (escape_line, escape_name):
            assert not unsafe(escape(f"a{character}b")) and "\n" not in escape(f"a{character}b")
        assert not unsafe(escape_text(f"a{character}b"))
