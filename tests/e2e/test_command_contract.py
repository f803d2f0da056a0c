"""The contract that every command keeps, one table for all of them.

The commands are found by walking the program, so that a new one without rows here fails. They run
in this process, through `main` as the installed `dm` does, on copies of one prepared store.
"""

import io
import json
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import click
import pytest

from dmsync.surfaces.cli import main as main_module
from dmsync.surfaces.cli.invocation import Invocation
from dmsync.surfaces.cli.main import dm, main
from tests.support.cluster import Result
from tests.support.signers import make_signer
from tests.support.tree import describe_tree

EXIT_CODES = {0, 1, 2, 3, 4, 10, 12, 13, 14, 15, 16, 17, 18, 75, 130}
CONFLICT = 15

Answer = Literal["document", "lines", "summary"]
"""What a success prints with --json: a query's document, a query's JSON lines that end in a
summary, or what a changing command prints: JSON lines that end in a summary."""


@dataclass(frozen=True)
class Row:
    """One way to use a command that succeeds.

    Lines are split as a shell does. `{tmp}` is the test's directory, with the store `here`, whose
    remote `backup` is the store `there`; `{seq}`, `{transfer}` and `{signers}` were prepared. A
    step `write NAME TEXT` writes a file of the dot, a step `conflicting ...` runs a
    command that ends in conflicts.
    """

    arguments: str
    answer: Answer = "summary"
    steps: tuple[str, ...] = ()
    code: int = 0
    dry_code: int | None = None
    """Where a dry run ends otherwise."""
    is_idle: bool = False
    """There is nothing to do, which is a success."""

    @property
    def is_changing(self) -> bool:
        return self.answer == "summary"


@dataclass(frozen=True)
class Rows:
    """All that is known of one command: uses that succeed, a bad one and its exit code."""

    bad: str
    code: int
    good: tuple[Row, ...]


def rows(bad: str, code: int, *good: Row) -> Rows:
    return Rows(bad, code, good)


def asks(arguments: str, *steps: str) -> Row:
    return Row(arguments, "document", steps)


def does(arguments: str, *steps: str, code: int = 0) -> Row:
    return Row(arguments, "summary", steps, code)


CHANGED = "write a.txt changed"
CLASH = "conflicting merge clash"
BEHIND = "reset --hard HEAD~1"

TABLE: dict[str, Rows] = {
    "init": rows(
        "init 'bad name'", 2, does("init new"), does("init new --at {tmp}/dir"),
        does("init --bare --home {tmp}/new"),
    ),
    "switch": rows("switch nope", 10, does("switch other")),
    "list": rows("list nope", 2, asks("list")),
    "dot show": rows("dot show nope", 10, asks("dot show"), asks("dot show other")),
    "dot path": rows("dot path nope", 10, asks("dot path other")),
    "dot delete": rows("dot delete -f nope", 10, does("dot delete -f other")),
    "dot rename": rows("dot rename nope new", 10, does("dot rename other new")),
    "dot set-upstream": rows(
        "dot set-upstream one", 2, does("dot set-upstream backup team/shop")
    ),
    "status": rows("status --dot nope", 10, asks("status", CHANGED)),
    "diff": rows("diff nope", 10, asks("diff", CHANGED), asks("diff HEAD~1 HEAD --stat")),
    "commit": rows(
        "commit", 2, does("commit -m changed", CHANGED), does("commit -m nothing"),
        does("commit --amend -m other", "commit -m here"),
        does("commit -m forced --amend-pushed"),
    ),
    "log": rows("log nope", 10, asks("log"), asks("log --graph v1.0..topic")),
    "show": rows("show nope", 10, asks("show"), asks("show v2.0 --stat")),
    "ls": rows("ls HEAD:nope", 10, asks("ls HEAD:__default__"), asks("ls")),
    "cat": rows("cat HEAD:nope", 10, Row("cat HEAD:__default__/a.txt", "lines")),
    "blame": rows("blame nope", 10, asks("blame -- __default__/a.txt")),
    "restore": rows(
        "restore nope -- __default__/a.txt", 10, does("restore __default__/a.txt", CHANGED)
    ),
    "export": rows(
        "export nope {tmp}/out", 10, does("export HEAD {tmp}/out"),
        does("export HEAD:__default__ {tmp}/out.tar"),
    ),
    "branch": rows(
        "branch -d nope", 10, asks("branch"), asks("branch --contains v1.0"), does("branch new"),
        does("branch -d topic"), does("branch -m topic new"),
    ),
    "checkout": rows(
        "checkout nope", 10, does("checkout topic", CHANGED), does("checkout -b new v1.0"),
        does("checkout -b new --carry", CHANGED),
    ),
    "reset": rows("reset nope", 10, does("reset --hard HEAD~1", CHANGED)),
    "merge": rows(
        "merge nope", 10, does("merge topic"), does("merge clash --theirs"),
        does("merge --abort", CLASH), does("merge --continue", CLASH, "resolve --all --ours"),
        does("merge clash", code=CONFLICT),
    ),
    "conflicts": rows("conflicts nope", 10, asks("conflicts"), asks("conflicts", CLASH)),
    "resolve": rows("resolve nope --ours", 10, does("resolve --all --theirs", CLASH)),
    "cherry-pick": rows("cherry-pick nope", 10, does("cherry-pick topic")),
    "revert": rows("revert nope", 10, does("revert HEAD")),
    "stash": rows("stash -m ''", 2, does("stash", CHANGED), Row("stash", is_idle=True)),
    "stash push": rows("stash push -m ''", 2, does("stash push -m away", CHANGED)),
    "stash list": rows("stash list nope", 2, asks("stash list", CHANGED, "stash")),
    "stash show": rows("stash show nope", 10, asks("stash show", CHANGED, "stash")),
    "stash pop": rows("stash pop nope", 10, does("stash pop", CHANGED, "stash")),
    "stash apply": rows("stash apply nope", 10, does("stash apply", CHANGED, "stash")),
    "stash drop": rows("stash drop nope", 10, does("stash drop 0", CHANGED, "stash")),
    "stash branch": rows(
        "stash branch new nope", 10, does("stash branch new", CHANGED, "stash")
    ),
    "tag": rows(
        "tag -d nope", 10, asks("tag"), does("tag new HEAD~1"), does("tag new -m annotated"),
        does("tag -d v1.0"),
    ),
    "verify": rows(
        "verify nope --allowed-signers {signers}", 10,
        asks("verify signed --allowed-signers {signers}"), asks("verify --raw signed"),
    ),
    "undo": rows(
        "undo --op 999999", 10, does("undo", "commit -m changed"), does("undo 2", "branch new"),
    ),
    "redo": rows("redo 0", 2, does("redo", "commit -m changed", "undo")),
    "reflog": rows("reflog nope", 10, asks("reflog"), asks("reflog topic")),
    "op log": rows("op log -n x", 2, asks("op log"), asks("op log -v")),
    "op show": rows("op show 999999", 10, asks("op show {seq}")),
    "op restore": rows("op restore 999999", 10, does("op restore {seq}", CHANGED)),
    "remote": rows("remote nope", 2, asks("remote"), asks("remote -v")),
    "remote add": rows("remote add 'bad name' x", 2, does("remote add new {tmp}/there")),
    "remote rm": rows("remote rm nope", 10, does("remote rm backup")),
    "remote rename": rows("remote rename nope new", 10, does("remote rename backup new")),
    "push": rows("push nope", 10, does("push backup shop topic"), does("push backup shop --all", "pull backup")),
    "pull": rows("pull nope", 10, does("pull backup", BEHIND)),
    "fetch": rows("fetch nope", 10, does("fetch backup")),
    "clone": rows("clone nope shop", 10, Row("clone {tmp}/there shop --home {tmp}/new", dry_code=10)),
    "transfer list": rows("transfer list -n 0", 2, asks("transfer list")),
    "transfer show": rows("transfer show 0000", 10, asks("transfer show {transfer}")),
    "bundle create": rows(
        "bundle create {tmp}/new.dmb nope", 10, does("bundle create {tmp}/new.dmb --all")
    ),
    "bundle verify": rows(
        "bundle verify {tmp}/nope", 10, asks("bundle verify {tmp}/b", "bundle create {tmp}/b")
    ),
    "bundle apply": rows(
        "bundle apply {tmp}/nope", 10,
        Row(
            "bundle apply {tmp}/b --home {tmp}/new", steps=("bundle create {tmp}/b",), dry_code=10
        ),
        does("bundle apply {tmp}/b", "bundle create {tmp}/b", BEHIND),
    ),
    "collaborator add": rows(
        "collaborator add nope ann", 10, does("collaborator add shop ann"),
        does("collaborator add {tmp}/there:shop ann"),
    ),
    "collaborator rm": rows(
        "collaborator rm shop ann", 10, does("collaborator rm shop ann", "collaborator add shop ann")
    ),
    "collaborator list": rows(
        "collaborator list nope", 10, asks("collaborator list"),
        asks("collaborator list backup:shop"),
    ),
    "quota set": rows("quota set team lots", 2, does("quota set team 20G")),
    "quota rm": rows("quota rm team", 10, does("quota rm team", "quota set team 5M")),
    "quota list": rows("quota list nope", 2, asks("quota list", "quota set team 5M")),
    "serve": rows("serve", 2),  # it goes on until it is stopped: tests/e2e/test_transports.py
    "prune": rows("prune --keep-within x", 2, does("prune --keep-last 1", "commit -m x", "commit -m y")),
    "gc": rows(
        "gc --grace x", 2, does("gc --grace 0", "branch -d topic"),
        does("gc shop --grace 0", "branch -d topic"), Row("gc", is_idle=True),
    ),
    "df": rows("df nope", 10, asks("df"), asks("df shop")),
    "fsck": rows(
        "fsck nope", 10, Row("fsck", "lines"), Row("fsck --full shop", "lines"),
        Row("fsck --repair", is_idle=True), Row("fsck --repair --from backup shop", is_idle=True),
    ),
    "version": rows("version nope", 10, asks("version"), asks("version backup")),
    "completion": rows("completion tcsh", 2, asks("completion fish")),
    "help": rows("help nope", 2, asks("help"), asks("help stash push")),
}  # fmt: skip


LONG = {
    "status", "diff", "commit", "restore", "export", "checkout", "reset", "merge", "resolve",
    "cherry-pick", "revert", "stash", "stash push", "stash apply", "stash pop", "stash branch",
    "op restore", "push", "pull", "fetch", "clone", "bundle create", "bundle apply", "prune", "fsck",
}  # fmt: skip
"""Commands that say how far they have come."""
QUICK = {
    "diff HEAD~1 HEAD --stat", "checkout topic", "push backup shop --all", "bundle apply {tmp}/b",
}  # fmt: skip
"""Lines of theirs that have nothing to read, write or send in more than one go."""

# --- the commands ------------------------------------------------------------------------------


def walk() -> Iterator[tuple[str, click.Command]]:
    """Every command and group below `dm`, with its words."""
    context = click.Context(dm)
    for name in dm.list_commands(context):
        command = dm.get_command(context, name)
        assert command is not None
        yield name, command
        if isinstance(command, click.Group):
            for below in command.list_commands(context):
                assert not isinstance(command.commands[below], click.Group)
                yield f"{name} {below}", command.commands[below]


ALL = dict(walk())
USABLE = [
    name
    for name, command in ALL.items()
    if not isinstance(command, click.Group) or command.invoke_without_command
]
GOOD = [(name, row) for name, known in TABLE.items() for row in known.good]
CHANGING = [(name, row) for name, row in GOOD if row.is_changing]


def title(row: Row) -> str:
    """The row's line and what goes before."""
    return f"{row.arguments} after {', '.join(row.steps)}" if row.steps else row.arguments


for_good = pytest.mark.parametrize(("name", "row"), GOOD, ids=[title(row) for _, row in GOOD])
for_changing = pytest.mark.parametrize(
    ("name", "row"), CHANGING, ids=[title(row) for _, row in CHANGING]
)


def test_every_command_has_rows() -> None:
    assert set(TABLE) == set(USABLE)
    assert all(known.good for name, known in TABLE.items() if name != "serve")


# --- running them ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """Stores that every test gets copies of, and what the table's lines name."""

    directory: Path
    names: dict[str, str]


class Bench:
    """A directory with the stores `here` and `there`, and `dm` working on `here`."""

    def __init__(self, directory: Path, names: dict[str, str]) -> None:
        self.directory = directory
        self._names = {"tmp": str(directory), **names}

    def words(self, line: str) -> list[str]:
        return shlex.split(line.format(**self._names))

    def take(self, steps: Sequence[str]) -> None:
        for step in steps:
            kind, *rest = words = self.words(step)
            if kind == "write":
                name, text = rest
                tree = dm_here("dot", "path", "shop").stdout.rstrip("\n")
                (Path(tree) / name).write_text(text)
                continue
            done = dm_here(*(rest if kind == "conflicting" else words))
            assert done.code == (CONFLICT if kind == "conflicting" else 0), done.describe()

    def run(self, line: str, *options: str) -> Result:
        return dm_here(*options, *self.words(line))

    def state(self) -> dict[str, object]:
        """What a dry run must leave: names, logs, packs, and the tree with its metadata."""
        stores = sorted(path.parent for path in self.directory.glob("*/format"))
        return {
            "names": sorted(path.name for path in self.directory.iterdir()),
            "logs": [
                dm_here("--home", str(home), "op", "log", "--json", "-v").stdout for home in stores
            ],
            "packs": {
                str(path): path.stat().st_size
                for home in stores
                for path in home.rglob("packs/**/*")
            },
            "trees": [
                describe_tree(path) for path in sorted(self.directory.glob("*/dots/*/trees"))
            ],
        }


def dm_here(*words: str) -> Result:
    """`dm` in this process, with streams of its own and nobody at the terminal."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2)]
    with (
        redirect_stdout(streams[0]),
        redirect_stderr(streams[1]),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(sys, "stdin", io.StringIO())
        patch.setattr(main_module, "install_handlers", lambda: None)
        code = main(words)
    texts = []
    for stream in streams:
        stream.flush()
        stream.seek(0)
        texts.append(stream.read())
    return Result(words, code, *texts)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """Branches master, topic and clash; tags, one of them signed; a remote that is ahead."""
    directory = tmp_path_factory.mktemp("prepared")
    key = make_signer(directory, "key")
    signers = directory / "signers"
    signers.write_text(f"ada@example.org {key.public}\n")
    here, there, ahead = (directory / name for name in ("here", "there", "ahead"))
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, directory)
        Bench(directory, {"key": str(key.path)}).take(
            (
                "init other", "init shop",
                "write a.txt one", "write b.txt same", "commit -m first",
                "tag v1.0", "branch topic", "branch clash", "write a.txt two", "commit -m second",
                "tag v2.0 -m annotated", "tag signed -m vouched --signing-key {key}",
                "checkout topic", "write c.txt new", "commit -m topical",
                "checkout clash", "write a.txt other", "commit -m clashing", "checkout master",
                "init --bare --home {tmp}/there", "remote add backup {tmp}/there", "push backup",
            )
        )  # fmt: skip
        shutil.copytree(here, ahead, symlinks=True)
        patch.setenv("DM_HOME", str(ahead))
        Bench(directory, {}).take(["write d.txt far", "commit -m ahead", "push backup"])
        patch.setenv("DM_HOME", str(here))
        operations = dm_here("op", "log", "--json").json()
        transfers = dm_here("transfer", "list", "--json").json()
    assert there.exists()
    names = {
        "seq": str(operations[5]["seq"]),
        "transfer": transfers[0]["id"],
        "signers": str(signers),
    }
    return Prepared(directory, names)


def set_environment(patch: pytest.MonkeyPatch, directory: Path) -> None:
    for name in [name for name in os.environ if name.startswith(("DM_", "XDG_"))]:
        patch.delenv(name)
    patch.setenv("HOME", str(directory))
    patch.setenv("DM_HOME", str(directory / "here"))
    patch.setenv("DM_AUTHOR", "Ada <ada@example.org>")


@pytest.fixture
def bench(prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    set_environment(monkeypatch, tmp_path)
    for store in ("here", "there"):
        shutil.copytree(prepared.directory / store, tmp_path / store, symlinks=True)
    config = tmp_path / "here" / "config.toml"
    config.write_text(f"[remote.backup]\nurl = {json.dumps(str(tmp_path / 'there'))}\n")
    config.chmod(0o600)
    (tmp_path / "dir").mkdir()
    return Bench(tmp_path, prepared.names)


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prepared: Prepared) -> Bench:
    """No store yet."""
    set_environment(monkeypatch, tmp_path)
    (tmp_path / "dir").mkdir()
    return Bench(tmp_path, prepared.names)


def json_lines(text: str) -> list[Any]:
    return [json.loads(line) for line in text.splitlines()]


def assert_one_error(done: Result) -> None:
    (error,) = json_lines(done.stderr)
    assert error["type"] == "error", done.describe()
    assert error["code"] != "bug", done.describe()
    assert error["message"] and isinstance(error["hint"], str)
    assert error["exit_code"] == done.code
    assert done.code in EXIT_CODES - {0}


# --- help --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_help_has_an_example_that_parses_and_names_json(name: str) -> None:
    told = dm_here(*name.split(), "--help")
    assert (told.code, told.stderr) == (0, "")
    command = ALL[name]
    # A group that only leads to commands takes no options of its own.
    is_mute = isinstance(command, click.Group) and not command.invoke_without_command
    assert is_mute or "--json" in told.stdout
    assert "Example: " in told.stdout
    assert command.epilog is not None
    lines = example_lines(command.epilog)
    assert any(line[: len(name.split())] == name.split() for line in lines), lines
    for line in lines:
        parse(line)


def example_lines(epilog: str) -> list[list[str]]:
    """The words after `dm` of each dm in an example; what else a shell would run is left out."""
    text = epilog.removeprefix("Example: ").replace('"$(', " ; ").replace("$(", " ; ")
    text = re.sub(r'\)"|\)', " ; ", text)
    lexer = shlex.shlex(text, posix=True, punctuation_chars=";&|<>")
    lexer.whitespace_split = True
    lines: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";&|<>"):
            lines.append([])
        else:
            lines[-1].append(word)
    return [line[1:] for line in lines if line and line[0] == "dm"]


def parse(words: list[str]) -> None:
    """Fails on a command, option or number of arguments that there is not."""
    command: click.Command = dm
    context = click.Context(dm, info_name="dm", obj=Invocation())
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        found = command.get_command(context, words[0])
        assert found is not None, words
        command, words = found, words[1:]
    command.make_context("dm", list(words), parent=context)


def test_an_example_that_does_not_parse_is_seen() -> None:
    assert example_lines("Example: cd $(dm dot path a) && dm log -n 1 | tail") == [
        ["dot", "path", "a"],
        ["log", "-n", "1"],
    ]
    for words in (["log", "--nope"], ["dot", "rename", "one"]):
        with pytest.raises(click.UsageError):
            parse(words)
    with pytest.raises(AssertionError):
        parse(["dot", "nope"])


# --- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TABLE)
def test_without_store_and_without_dots_errors_are_one_json_object(name: str, empty: Bench) -> None:
    known = TABLE[name]
    lines = [known.bad, *(row.arguments for row in known.good)]
    for line in lines:
        check_refusal_or_answer(empty.run(line, "--json", "--dry-run"))
    assert [path.name for path in empty.directory.iterdir()] == ["dir"]
    empty.take(["init --bare"])
    for line in lines:
        check_refusal_or_answer(empty.run(line, "--json", "--dry-run"))


def check_refusal_or_answer(done: Result) -> None:
    if done.code:
        assert_one_error(done)
    else:
        assert all(note["type"] in ("note", "warning") for note in json_lines(done.stderr))
        assert done.stdout


@pytest.mark.parametrize("name", TABLE)
def test_a_bad_input_has_its_exit_code_and_changes_nothing(name: str, bench: Bench) -> None:
    known = TABLE[name]
    before = bench.state()
    done = bench.run(known.bad, "--json")
    assert done.code == known.code, done.describe()
    assert_one_error(done)
    assert done.stdout == ""
    assert bench.state() == before
    told = bench.run(known.bad, "-q")
    assert told.code == known.code
    assert told.stdout == ""
    assert told.stderr.startswith("dm: error: ")


# --- what works --------------------------------------------------------------------------------


@for_good
def test_json_is_one_document_or_lines_with_a_summary(name: str, row: Row, bench: Bench) -> None:
    bench.take(row.steps)
    before = bench.state() if row.is_changing else None
    done = bench.run(row.arguments, "--json")
    assert done.code == row.code, done.describe()
    assert {note["type"] for note in json_lines(done.stderr)} <= {"note", "warning"}
    if row.answer == "document":
        assert isinstance(done.json(), dict | list)
        return
    *progress, last = json_lines(done.stdout)
    assert last["type"] == "summary", done.describe()
    assert all(line["type"] != "summary" for line in progress), done.describe()
    assert last.get("exit_code", done.code) == done.code
    if row.is_changing:  # or the dry run of this row would prove nothing
        assert (bench.state() == before) is row.is_idle


@for_good
def test_progress_and_profile_go_with_every_command(name: str, row: Row, bench: Bench) -> None:
    """They add lines of their own types, and change neither the answer nor the exit code."""
    bench.take(row.steps)
    done = bench.run(row.arguments, "--json", "--progress", "--profile")
    assert done.code == row.code, done.describe()
    *told, profile = json_lines(done.stderr)
    assert profile["type"] == "profile"
    assert {note["type"] for note in told} <= {"note", "warning", "progress"}
    if row.answer == "document":
        assert isinstance(done.json(), dict | list)
    else:
        *before, last = json_lines(done.stdout)
        assert last["type"] == "summary", done.describe()
        assert last["stages"] is not None
        told += [line for line in before if line["type"] == "progress"]
    shown = [note for note in told if note["type"] == "progress"]
    assert all(note["title"] and note["phase"] for note in shown), done.describe()
    is_quick = name not in LONG or row.arguments in QUICK
    assert shown or is_quick, done.describe()


@for_good
def test_quiet_commands_say_nothing_but_answers(name: str, row: Row, bench: Bench) -> None:
    bench.take(row.steps)
    done = bench.run(row.arguments, "-q")
    assert done.code == row.code, done.describe()
    assert done.stderr == "", done.describe()
    if row.is_changing:
        assert done.stdout == "", done.describe()


@for_changing
def test_a_dry_run_changes_nothing_and_says_so(name: str, row: Row, bench: Bench) -> None:
    assert any("--dry-run" in parameter.opts for parameter in ALL[name].params)
    code = row.code if row.dry_code is None else row.dry_code
    bench.take(row.steps)
    before = bench.state()
    human = bench.run(row.arguments, "--dry-run")
    as_json = bench.run(row.arguments, "--dry-run", "--json")
    quiet = bench.run(row.arguments, "--dry-run", "-q")
    assert bench.state() == before
    assert (human.code, as_json.code, quiet.code) == (code, code, code), human.describe()
    assert human.stdout + human.stderr
    if code not in (0, CONFLICT):
        assert_one_error(as_json)
        return
    assert as_json.summary()["dry_run"] is True
    assert quiet.stdout + quiet.stderr == ""
