"""Known holes by words: addresses that are options, names that are paths, settings, owners,
directories in which a command is run, what is printed."""

import os
import shutil
import stat
import subprocess
import sys
import unicodedata
from collections.abc import Callable, Sequence
from typing import Final

from dmsync.surfaces.cli.crash_log import write_crash_log
from tools.faults.cases import Case, Stage
from tools.faults.forked import CHECKOUT
from tools.faults.hostile_trees import HostileStore

STRANGER: Final = 54321
USAGE: Final = 2


def _refused_words(
    *lines: Sequence[str], codes: tuple[int, ...] = (USAGE, 10)
) -> Callable[[Stage], str]:
    """Each command line ends with one of `codes`, prints nothing unsafe and runs nothing."""

    def play(stage: Stage) -> str:
        for words in lines:
            ran = stage.scene.run(*[word.replace("MARK", stage.mark) for word in words])
            if ran.code not in codes or ran.is_crash:
                return f"dm {' '.join(words)!r}: {ran.told()}"
            if unsafe(ran.stderr + ran.stdout):
                return f"dm {' '.join(words)!r} prints control characters"
        return ""

    return play


def unsafe(output: bytes) -> list[str]:
    """Characters of an output that a terminal would act on."""
    text = output.decode("utf-8", "replace")
    return [
        c for c in text if c not in "\n\t" and unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")
    ]


def _url(*urls: str) -> Callable[[Stage], str]:
    return _refused_words(*(["remote", "add", "bad", "--", url] for url in urls))


# --- settings and owners -------------------------------------------------------------------------

_HOOK: Final = """[dot.{dot}.hooks]
quiesce = "touch {mark}"
[diff.x]
command = "touch {mark}"
patterns = ["*"]
"""


def _tree_settings(stage: Stage) -> str:
    """Settings and hooks that lie in a tree are content."""
    text = _HOOK.format(dot="evil", mark=stage.mark).encode()

    def build(maker: object) -> object:
        names = (b"config.toml", b".dm", b".gitattributes", b".gitmodules", b"hooks")
        return maker.root([maker.file(name, text) for name in names])  # type: ignore[attr-defined]

    dot = stage.scene.make(build)  # type: ignore[arg-type]
    stage.scene.must(stage.scene.run("clone", "evil", dot))
    tree = stage.tree(dot)
    with open(os.path.join(tree, "new"), "w") as file:
        file.write("x")
    for words in (["diff"], ["commit", "-m", "x"], ["checkout", "-b", "y"], ["diff", "HEAD~1"]):
        ran = stage.scene.run(*words, "--dot", dot)
        if ran.code != 0:
            return ran.told()
    return ""


def _run_in(
    stage: Stage, directory: str, *words: str, **environment: str
) -> subprocess.CompletedProcess[bytes]:
    """The installed `dm`, run in a directory."""
    program = os.path.join(os.path.dirname(sys.executable), "dm")
    return subprocess.run(
        [program, *words],
        cwd=directory,
        env={**stage.scene.good_environment, **environment},
        capture_output=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )


def _modules_beside(stage: Stage) -> str:
    place = stage.new("modules")
    os.mkdir(place)
    for name in ("json", "tomllib", "blake3", "msgpack", "zstandard", "sitecustomize", "dmsync"):
        with open(os.path.join(place, f"{name}.py"), "w") as file:
            file.write(f"open({stage.mark!r}, 'w')\n")
    for words in (["list"], ["status"], ["clone", "evil", "nothing"]):
        _run_in(stage, place, *words)
    return ""


def _settings_above(stage: Stage) -> str:
    """A store or settings in the directory, or above it, are not looked for."""
    place = stage.new("above")
    below = os.path.join(place, "a", "b")
    os.makedirs(below)
    for above in (place, below):
        for name in ("config.toml", ".dm", "dm.toml"):
            with open(os.path.join(above, name), "w") as file:
                file.write(_HOOK.format(dot="own", mark=stage.mark))
    ran = _run_in(stage, below, "commit", "-m", "x", "--dot", "own")
    return "" if ran.returncode == 0 else ran.stderr.decode()


def _pager(stage: Stage) -> str:
    command = f"touch {stage.mark}"
    names = ("PAGER", "GIT_PAGER", "DM_PAGER", "LESSOPEN", "EDITOR", "VISUAL", "DIFF", "BROWSER")
    ran = _run_in(stage, stage.directory, "log", **dict.fromkeys(names, command))
    _run_in(stage, stage.directory, "diff", **dict.fromkeys(names, command))
    return "" if ran.returncode == 0 else ran.stderr.decode()


def _foreign_store(stage: Stage, *, sudo: str = "", owner: int = STRANGER) -> int | None:
    home = stage.new("foreign")
    with HostileStore(home):
        pass
    with open(os.path.join(home, "config.toml"), "w") as file:
        file.write(_HOOK.format(dot="x", mark=stage.mark))
    os.chmod(os.path.join(home, "config.toml"), 0o600)
    for above, folders, files in os.walk(home):
        for name in (".", *folders, *files):
            os.chown(os.path.join(above, name), owner, owner)
    environment = {"DM_HOME": home, **({"SUDO_UID": sudo} if sudo else {})}
    codes = set()
    for with_config in (True, False):
        if not with_config:
            os.unlink(os.path.join(home, "config.toml"))
        codes.add(_run_in(stage, stage.directory, "list", **environment).returncode)
    return codes.pop() if len(codes) == 1 else min(codes)


def _foreign(stage: Stage) -> str:
    return "" if _foreign_store(stage) in (USAGE, 12) else "another user's store was used"


def _sudo(stage: Stage) -> str:
    if _foreign_store(stage, sudo=str(STRANGER)) != 0:
        return "the store of sudo's caller was refused"
    if _foreign_store(stage, sudo=str(STRANGER + 1)) == 0:
        return "a third user's store was used through sudo"
    return "" if _foreign_store(stage, sudo="0x1") != 0 else "SUDO_UID was misread"


def _writable_settings(stage: Stage) -> str:
    path = stage.new("config.toml")
    with open(path, "w") as file:
        file.write(_HOOK.format(dot="own", mark=stage.mark))
    for mode, owner in ((0o666, 0), (0o602, 0), (0o620, 0), (0o600, STRANGER)):
        os.chmod(path, mode)
        os.chown(path, owner, 0)
        ran = _run_in(stage, stage.directory, "commit", "-m", "x", DM_CONFIG=path)
        if ran.returncode != USAGE:
            return f"settings of mode {mode:o} of user {owner} were read"
    return ""


def _store_is_private(stage: Stage) -> str:
    home = stage.new("private")
    before = os.umask(0)
    try:
        ran = _run_in(stage, stage.directory, "init", "x", DM_HOME=home)
    finally:
        os.umask(before)
    if ran.returncode != 0:
        return ran.stderr.decode()
    mode = stat.S_IMODE(os.stat(home).st_mode)
    return "" if mode == 0o700 else f"a store of mode {mode:o}"


def _crash_log(stage: Stage) -> str:
    """The log of an unexpected failure is not written through a link that lies in its place."""
    home = stage.new("logged")
    with HostileStore(home):
        pass
    os.symlink(stage.outside.file, os.path.join(home, "crash.log"))
    os.environ["DM_HOME"] = home
    try:
        path = write_crash_log(ValueError("x\x1b[31m\nfake"), ["x"], None)
    finally:
        del os.environ["DM_HOME"]
    if path is not None:
        os.unlink(path)
    return ""


def _clone_copies(stage: Stage) -> str:
    """Packs come over the protocol, whole: no file of the other store is linked to."""
    dot = stage.scene.make(lambda m: m.root([m.file(b"f")]))
    stage.scene.must(stage.scene.run("clone", "evil", dot))
    for above, _, files in os.walk(stage.scene.good):
        for name in files:
            if os.lstat(os.path.join(above, name)).st_nlink > 1:
                return f"{name} has several names"
    return ""


def _linked_packs(stage: Stage) -> str:
    """A store whose files are links elsewhere gives nothing of there away."""
    home = stage.new("linked")
    with HostileStore(home) as store:
        dot = store.make_dot("leaky")
        store.commit(dot, lambda m: m.root([m.file(b"f", b"x" * 5000)]))
    packs = os.path.join(home, "dots", dot.hex(), "packs")
    for name in os.listdir(packs):
        if name.endswith(".pack"):
            os.unlink(os.path.join(packs, name))
            os.symlink(stage.outside.file, os.path.join(packs, name))
    scene = stage.scene
    scene.run("remote", "rm", "leaky")
    scene.must(scene.run("remote", "add", "leaky", home))
    ran = scene.run("clone", "leaky", "leaky")
    return "" if ran.code not in (0, None) and not ran.is_crash else ran.told()


def _verify_unsigned(stage: Stage) -> str:
    dot = stage.scene.make(lambda m: m.root([m.file(b"f")]))
    stage.scene.must(stage.scene.run("clone", "evil", dot))
    ran = stage.scene.run("verify", "HEAD", "--dot", dot)
    return "" if ran.code not in (0, None) and not ran.is_crash else "an unsigned commit is good"


def _log_lines(stage: Stage) -> str:
    """A message cannot make a second record, nor speak to the terminal."""
    with HostileStore(stage.scene.evil) as store:
        dot = store.make_dot("speaking")
        store.commit(
            dot,
            lambda m: m.root([m.file(b"\x1b[2J\nfake")]),
            author="Eve\x1b]0;x\x07\ncommit 1234",
            message="one\x1b[8m\x9b\u202e\u2028\ntwo",
        )
    scene = stage.scene
    scene.must(scene.run("clone", "evil", "speaking"))
    for words in (
        ["log"],
        ["log", "--stat"],
        ["show"],
        ["ls", "HEAD:__default__"],
        ["blame", "HEAD"],
    ):
        ran = scene.run(*words, "--dot", "speaking")
        if unsafe(ran.stdout + ran.stderr) or ran.is_crash:
            return f"dm {words[0]} prints control characters"
    listed = scene.run("ls", "HEAD:__default__", "--dot", "speaking").stdout
    return "" if listed.count(b"\n") == 1 else "one name is two lines"


def _driver_names(stage: Stage) -> str:
    """Names reach commands of the user's own settings as values, never as part of a command."""
    config = stage.new("drivers")
    with open(config, "w") as file:
        file.write('[diff.x]\ncommand = "echo $DM_PATH >/dev/null"\npatterns = ["*"]\n')
    os.chmod(config, 0o600)
    name = f"$(touch {os.path.basename(stage.mark)});`touch x`%P"
    dot = stage.scene.make(
        lambda m: m.root([m.file(name.encode(), b"1")]),
        lambda m: m.root([m.file(name.encode(), b"2")]),
    )
    stage.scene.must(stage.scene.run("clone", "evil", dot))
    before = set(os.listdir(stage.directory))
    ran = _run_in(stage, stage.directory, "diff", "HEAD~1", "HEAD", "--dot", dot, DM_CONFIG=config)
    if set(os.listdir(stage.directory)) != before:
        return "a name was executed"
    return "" if ran.returncode == 0 else ran.stderr.decode()


EXPECTED_PROGRAMS: Final = frozenset({"dm", os.path.basename(os.path.realpath(sys.executable))})


def _programs(stage: Stage) -> str:
    """A clone, a commit and a checkout start nothing but the other side of a local remote."""
    if shutil.which("strace") is None:
        return "no strace here"
    dot = stage.scene.make(lambda m: m.root([m.file(b"hooks"), m.file(b"config.toml")]))
    trace = stage.new("trace")
    program = os.path.join(CHECKOUT, ".venv", "bin", "dm")
    if not os.path.exists(program):
        program = os.path.join(os.path.dirname(sys.executable), "dm")
    home = stage.new("traced")
    lines = (["init", "x"], ["remote", "add", "evil", stage.scene.evil], ["clone", "evil", dot])
    for words in (
        *lines,
        ["commit", "-m", "x", "--dot", dot],
        ["checkout", "-b", "y", "--dot", dot],
    ):
        done = subprocess.run(
            [
                "strace",
                "-f",
                "-A",
                "-qq",
                "-e",
                "trace=execve,execveat",
                "-o",
                trace,
                program,
                *words,
            ],
            env={**stage.scene.good_environment, "DM_HOME": home},
            capture_output=True,
            timeout=120,
            check=False,
        )
        if done.returncode != 0:
            return done.stderr.decode()
    with open(trace) as file:
        started = [line.split('"')[1] for line in file if "exec" in line and " = 0" in line]
    strange = {os.path.basename(path) for path in started} - {
        *(*EXPECTED_PROGRAMS, "python", "python3", "python3.11", "uname"),
        *("sh", "dash", "bash", "pyenv"),
    }  # fmt: skip
    return f"started {sorted(strange)}" if strange or not started else ""


# --- the table -----------------------------------------------------------------------------------

_OPTION: Final = "-oProxyCommand=touch${IFS}MARK"

WORD_CASES: Final = (
    Case("git CVE-2017-1000117", "ssh://-option is an option of ssh", "refused as an address",
         _url(f"ssh://{_OPTION}/x", "ssh://-oX@host/x")),
    Case("git CVE-2018-17456", "an address that begins with a dash", "refused",
         _url("-u", "--upload-pack=touch MARK", _OPTION)),
    Case("hg CVE-2017-1000116", "hg: ssh host beginning with a dash", "refused",
         _url("-oProxyCommand=touch MARK:22", "user@-oProxyCommand=x:/p")),
    Case("svn CVE-2017-9800", "svn+ssh://-option", "only ssh:// and paths are understood",
         _url(f"svn+ssh://{_OPTION}/x")),
    Case("hg CVE-2014-9462", "shell text in the host", "refused, and no shell is used",
         _url("ssh://host;touch MARK/x", "ssh://$(touch MARK)/x", "host|touch MARK:/x")),
    Case("OpenSSH CVE-2020-15778", "backticks in a remote path", "refused in paths",
         _url("ssh://host/`touch MARK`", "host:/a$(touch MARK)", "host:/a;touch MARK")),
    Case("dulwich 1.2.8 quoting", "quotes in an ssh path", "refused in paths",
         _url("host:/a'b", 'ssh://host/a"b', "host:/a\\b")),
    Case("git CVE-2015-7545", "ext:: runs a command", "no such transport",
         _url("ext::sh -c touch% MARK", "fd::7", "file:///etc", "http://x/y", "git://x/y")),
    Case("hg CVE-2016-3068", "git ext:: from a subrepository", "no such transport",
         _url("git+ext::touch MARK", "hg::x", "rsync://x/y")),
    Case("git CVE-2020-5260", "newline in a host leaks credentials", "refused",
         _url("ssh://host%0a.evil/x\n", "ssh://ho\nst/x", "ssh://host/x\ny")),
    Case("git CVE-2020-11008", "an address without host", "refused",
         _url("ssh:///x", "ssh://@/x", "ssh://:22/x", "ssh://user@:22/x")),
    Case("git CVE-2021-40330", "newline in a path forges a request", "refused",
         _url("host:/x\nhost=evil", "ssh://host/x\r\ny")),
    Case("git CVE-2024-50349", "escapes in a host fool who is asked", "refused, shown escaped",
         _url("ssh://\x1b[2Jhost/x", "ssh://\u202etsoh/x", "ssh://ho\x9bst/x")),
    Case("git CVE-2024-52006", "CR in an address is taken for a newline", "refused",
         _url("ssh://host\r/x", "ssh://us\rer@host/x")),
    Case("git CVE-2025-48384", "a trailing CR is lost when read again", "refused",
         _url("ssh://host/x\r", "/tmp/x\r", "host:/x\r")),
    Case("git CVE-2018-11235", "a submodule named ../../x", "dots have no such names",
         _refused_words(["init", "--", "../../x"], ["dot", "rename", "own", "../x"],
                        ["clone", "evil", "x", "--local-name", "../x"])),
    Case("git CVE-2019-1387", "names that fold into each other's directories", "one alphabet",
         _refused_words(["init", "--", "x/y/z"], ["init", "--", "x:y"], ["init", "--", "x."],
                        ["checkout", "-b", "../../hooks"], ["checkout", "-b", "a/../b"])),
    Case("git CVE-2023-29007", "long lines in settings become sections", "no such names or values",
         _refused_words(["remote", "rename", "evil", "x" * 2000 + "\n[dot.own.hooks]"],
                        ["remote", "add", "a\n[x]", "/tmp"])),
    Case("dulwich 1.2.7 refs", "ref names that are paths", "refused as names and revisions",
         _refused_words(["checkout", "-b", "../../x"], ["tag", "--", "../x"],
                        ["branch", "--", "/x"], ["reset", "--hard", "branch/../../x"])),
    Case("GNU tar CVE-2016-6321", "dots in what is extracted", "paths of a dot have none",
         _refused_words(["restore", "HEAD", "--", "../x"], ["restore", "HEAD", "--", "a/../../x"],
                        ["export", "HEAD:../..", "/tmp/never"], ["cat", "HEAD:__default__/../x"])),
    Case("git CVE-2019-19604", "settings in a repository run commands", "content is content",
         _tree_settings),
    Case("git CVE-2022-24765", "somebody else's store above the directory", "refused", _foreign),
    Case("git 2.35.3 sudo", "root through sudo", "the caller's store only, and not its settings",
         _sudo),
    Case("git CVE-2022-29187", "stores found by walking up", "none is looked for", _settings_above),
    Case("git CVE-2024-32465", "settings of an unpacked archive", "only private ones of one's own",
         _writable_settings),
    Case("git CVE-2017-8386", "a pager is a shell", "there is no pager", _pager),
    Case("docker CVE-2019-14271", "libraries of the place are loaded", "never from the directory",
         _modules_beside),
    Case("docker CVE-2021-41091", "the data directory is open to all", "0700 whatever the umask",
         _store_is_private),
    Case("rsync CVE-2026-53802", "a log written through a link", "O_NOFOLLOW", _crash_log),
    Case("git CVE-2024-32020", "a clone shares files with its source", "nothing is linked",
         _clone_copies),
    Case("git CVE-2022-39253", "links in the source are copied", "packs are read, by their hash",
         _linked_packs),
    Case("dulwich 1.2.8 signatures", "unsigned is taken for good", "said and exit code",
         _verify_unsigned),
    Case("CWE-117 rsync", "control characters in logs", "escaped, one line a record", _log_lines),
    Case("dulwich CVE-2026-42563", "names in the command of a driver", "in variables only",
         _driver_names),
    Case("git 2.30.2 hooks", "what a clone starts", "nothing but the other side", _programs),
)  # fmt: skip
