"""Completion of stored names, asked as a shell asks: `_DM_COMPLETE` and the words so far."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import click
import pytest

from dmsync.surfaces.cli.completions import StoredName, Words
from dmsync.surfaces.cli.invocation import FileName
from dmsync.surfaces.cli.main import COMMANDS, dm, main

SCRIPT = """
init other
init shop
branch-file
commit -m first
branch topic
branch topaz
tag v1.0
tag v2.0 -m second
remote add backup /nonexistent/there
stash-file
stash -m unfinished
"""


def run(home: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("DM_")}
    return subprocess.run(
        [sys.executable, "-m", "dmsync", *arguments],
        env={**kept, "DM_HOME": str(home), **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with dots other and shop; shop has branches, tags, a stash and a remote."""
    home = tmp_path_factory.mktemp("completions") / "store"
    for line in SCRIPT.strip().splitlines():
        words = line.split()
        if words[0].endswith("-file"):
            tree = Path(run(home, "dot", "path", "shop").stdout.strip())
            (tree / words[0]).write_text(words[0])
            continue
        done = run(home, *words)
        assert done.returncode == 0, done.stderr
    return home


@pytest.fixture
def complete(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """What is offered for the last of the words, those of `dm WORDS`, with that DM_HOME."""

    def ask(home: Path, *words: str, **environment: str) -> list[str]:
        line = {"COMP_WORDS": " ".join(["dm", *words]), "COMP_CWORD": str(len(words))}
        with monkeypatch.context() as patch:
            for name in [name for name in os.environ if name.startswith("DM_")]:
                patch.delenv(name)
            asked = {"_DM_COMPLETE": "bash_complete", "DM_HOME": str(home), **line, **environment}
            for name, value in asked.items():
                patch.setenv(name, value)
            with pytest.raises(SystemExit) as end:
                main([])
        told = capsys.readouterr()
        assert (end.value.code, told.err) == (0, "")
        found = [one.split(",", 1) for one in told.out.splitlines() if one]
        assert {kind for kind, _ in found} <= {"plain"}
        return sorted(name for _, name in found)

    return ask


@pytest.fixture
def offered(home: Path, complete: Callable[..., list[str]]) -> Callable[..., list[str]]:
    """The same of the prepared store."""
    return partial(complete, home)


BRANCHES = ["master", "topaz", "topic"]
DOTS = ["other", "shop"]
TAGS = ["v1.0", "v2.0"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["switch", ""], DOTS),
        (["switch", "s"], ["shop"]),
        (["dot", "show", ""], DOTS),
        (["dot", "path", "o"], ["other"]),
        (["dot", "delete", "-f", ""], DOTS),
        (["dot", "rename", ""], DOTS),
        (["dot", "rename", "shop", ""], []),
        (["dot", "set-upstream", ""], ["backup", *DOTS]),
        (["dot", "set-upstream", "shop", ""], ["backup"]),
        (["dot", "set-upstream", "shop", "backup", ""], []),
        (["fsck", ""], DOTS),
        (["fsck", "shop", "o"], ["other"]),
        (["prune", ""], DOTS),
        (["prune", "--keep-not-pushed", ""], ["backup"]),
        (["--dot", ""], DOTS),
        (["log", "--dot", "s"], ["shop"]),
        (["checkout", "to"], ["topaz", "topic"]),
        (["checkout", "-b", "new", "v"], TAGS),
        (["branch", ""], []),
        (["branch", "new", "to"], ["topaz", "topic"]),
        (["branch", "-d", ""], BRANCHES),
        (["branch", "-m", "topi"], ["topic"]),
        (["branch", "--contains", "v"], TAGS),
        (["branch", "--no-contains", "v"], TAGS),
        (["branch", "--merged", "m"], ["master"]),
        (["branch", "--no-merged", "m"], ["master"]),
        (["reset", "--hard", "to"], ["topaz", "topic"]),
        (["merge", "topi"], ["topic"]),
        (["cherry-pick", "master", "to"], ["topaz", "topic"]),
        (["revert", "v1"], ["v1.0"]),
        (["log", "v"], TAGS),
        (["log", "v1.0..to"], ["v1.0..topaz", "v1.0..topic"]),
        (["log", "v1.0...ma"], ["v1.0...master"]),
        (["log", "^to"], ["^topaz", "^topic"]),
        (["log", "topic", "--", "to"], []),
        (["blame", "to"], ["topaz", "topic"]),
        (["blame", "--", ""], []),
        (["diff", "master..to"], ["master..topaz", "master..topic"]),
        (["diff", "topic", "v"], TAGS),
        (["show", "ma"], ["master"]),
        (["ls", "to"], ["topaz:", "topic:"]),
        (["cat", "H"], ["HEAD:"]),
        (["cat", "HEAD:__d"], []),
        (["export", "v"], ["v1.0:", "v2.0:"]),
        (["restore", "to"], ["topaz", "topic"]),
        (["restore", "topic", "to"], []),
        (["restore", "topic", "--", ""], []),
        (["tag", ""], []),
        (["tag", "v3.0", "to"], ["topaz", "topic"]),
        (["tag", "-d", ""], TAGS),
        (["tag", "-d", "v1.0", "v2"], ["v2.0"]),
        (["tag", "--verify", ""], TAGS),
        (["tag", "--contains", "ma"], ["master"]),
        (["verify", "v1.0..to"], ["v1.0..topaz", "v1.0..topic"]),
        (["reflog", ""], BRANCHES),
        (["bundle", "create", "x.dmb", "v1.0..ma"], ["v1.0..master"]),
        (["remote", "rm", ""], ["backup"]),
        (["remote", "rename", ""], ["backup"]),
        (["remote", "rename", "backup", ""], []),
        (["remote", "add", ""], []),
        (["push", ""], ["backup"]),
        (["push", "backup", ""], DOTS),
        (["push", "backup", "shop", "to"], ["topaz", "topic"]),
        (["push", "backup", "other", "to"], []),
        (["pull", "backup", "shop", "ma"], ["master"]),
        (["fetch", "backup", "o"], ["other"]),
        (["clone", ""], ["backup"]),
        (["clone", "backup", ""], []),
        (["version", ""], ["backup"]),
        (["help", "st"], ["stash", "status"]),
        (["help", "stash", "p"], ["pop", "push"]),
    ],
)
def test_names_are_offered_where_they_are_meant(
    words: list[str], names: list[str], offered: Callable[..., list[str]]
) -> None:
    assert offered(*words) == names


def test_stashes(offered: Callable[..., list[str]]) -> None:
    for command in (["show"], ["pop"], ["apply"], ["drop"], ["branch", "new"]):
        (name,) = offered("stash", *command, "")
        assert name.startswith("stash/master-")
    assert offered("reset", "stash/") == [name]


def test_the_dot_and_the_store_asked_for_decide(
    home: Path,
    offered: Callable[..., list[str]],
    complete: Callable[..., list[str]],
    tmp_path: Path,
) -> None:
    """As flags, before and after the command, and in the environment."""
    assert offered("checkout", "--dot", "shop", "") == BRANCHES
    assert offered("checkout", "--dot", "other", "") == []
    assert offered("--dot", "other", "checkout", "") == []
    assert offered("checkout", "", DM_DOT="other") == []
    assert offered("checkout", "--dot", "shop", "", DM_DOT="other") == BRANCHES
    assert offered("checkout", "--home", str(tmp_path / "none"), "") == []
    assert complete(tmp_path / "none", "checkout", "--home", str(home), "") == BRANCHES
    assert complete(tmp_path / "none", "--home", str(home), "--dot", "s") == ["shop"]
    assert offered("checkout", "--dot", "nonsense", "") == []


@pytest.mark.parametrize(
    "words", [["switch", ""], ["checkout", ""], ["log", "--dot", ""], ["push", ""], ["cat", ""]]
)
def test_without_a_store_nothing_is_offered_printed_or_made(
    words: list[str], complete: Callable[..., list[str]], tmp_path: Path
) -> None:
    assert complete(tmp_path / "none", *words) == []
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("broken", ["format", "catalog.sqlite", "config.toml"])
def test_a_broken_store_offers_nothing_or_the_names(
    broken: str, home: Path, complete: Callable[..., list[str]], tmp_path: Path
) -> None:
    """The catalog is derived, so a broken one may be made anew."""
    copy = tmp_path / "store"
    shutil.copytree(home, copy)
    found = list(copy.rglob(broken)) or [copy / broken]
    for path in found:
        path.write_bytes(b"\xff not what it was [")
    assert complete(copy, "checkout", "") in ([], BRANCHES)


def test_words_that_a_command_would_refuse_are_no_obstacle(
    offered: Callable[..., list[str]],
) -> None:
    assert offered("checkout", "--lock-wait", "x", "to") == ["topaz", "topic"]
    assert offered("checkout", "--at-op", "x", "to") == ["topaz", "topic"]
    assert offered("log", "caf\udce9", "to") == ["topaz", "topic"]


@pytest.mark.parametrize(
    ("shell", "position", "lines"),
    [
        ("bash", "2", ["plain,topaz", "plain,topic"]),
        ("zsh", "2", ["plain", "topaz", "_", "plain", "topic", "_"]),
        ("fish", "to", ["plain,topaz", "plain,topic"]),
    ],
)
def test_every_shell_gets_them_from_a_process(
    shell: str, position: str, lines: list[str], home: Path
) -> None:
    line = {"COMP_WORDS": "dm checkout to", "COMP_CWORD": position}
    done = run(home, _DM_COMPLETE=f"{shell}_complete", **line)
    assert (done.returncode, done.stderr) == (0, "")
    assert [one for one in done.stdout.splitlines() if one] == lines


def stored_types() -> set[StoredName | Words]:
    found: set[StoredName | Words] = set()

    def walk(command: click.Command, context: click.Context) -> None:
        for parameter in command.params:
            if isinstance(parameter.type, StoredName | Words):
                found.add(parameter.type)
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                below = command.get_command(context, name)
                assert below is not None
                walk(below, context)

    walk(dm, click.Context(dm))
    return found


def test_no_text_is_refused_by_such_a_type_and_none_is_changed() -> None:
    types = stored_types()
    assert len(types) >= 9
    for one in types:
        assert isinstance(one, click.types.StringParamType)
        assert one.name == click.STRING.name
        for text in ("", "a b", "x:y", "é", "\x1b", "caf\udce9", "-", "HEAD@{2 days ago}"):
            assert one.convert(text, None, None) == text


@pytest.mark.parametrize(
    ("command", "is_welcome"),
    [("cat", True), ("ls", True), ("export", True), ("restore", True), ("show", False)],
)
def test_bytes_that_are_no_text_are_welcome_in_paths_alone(command: str, is_welcome: bool) -> None:
    assert any(command in section for section in COMMANDS.values())
    found = dm.get_command(click.Context(dm), command)
    assert found is not None
    argument = next(p for p in found.params if isinstance(p, click.Argument))
    assert isinstance(argument.type, FileName) is is_welcome


def test_completing_loads_no_module_before_it_is_asked() -> None:
    code = (
        "import sys\nfrom dmsync.surfaces.cli.main import main\n"
        "import dmsync.surfaces.cli.completions\n"
        "assert main(['version']) == 0\n"
        "print([m for m in ('click.shell_completion', 'dmsync.engine.store', 'sqlite3')"
        " if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
