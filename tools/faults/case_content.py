"""Known holes by content: what a peer records, what lies in a tree that somebody else owns, and
what is swapped while it is looked at."""

import os
import socket
import stat
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from dmsync.core.encoding import encode
from dmsync.core.ids import Kind
from dmsync.core.objects import entry_from_value
from dmsync.core.pages import DIRECTORY, decode_page
from dmsync.engine import restore
from dmsync.engine.restore import restore_tree
from dmsync.errors import BadObject, DmError, ProtocolError
from dmsync.storage.object_store import ObjectStore
from dmsync.wire.frames import Flag, Frame
from dmsync.wire.messages import RefsReply, message_from_frame
from tools.faults.cases import Case, Stage
from tools.faults.content_applied import _groups, _kinds, _links, _plain, _through_links, _untrusted
from tools.faults.content_corpus import REFUSED, Build
from tools.faults.flipper import Flipper
from tools.faults.hostile_trees import RawEntry, TreeMaker, raw
from tools.faults.race_trees import race_restores, race_scans
from tools.faults.receiving import WAYS, is_refused
from tools.faults.row import Row

Play = Callable[[Stage], str]
HANG_S: Final = 30


def _refused(way: str, *whats: str) -> Play:
    """Trees of the corpus, refused where they arrive."""
    return _sent(way, *(REFUSED[what] for what in whats))


def _names(way: str, *names: bytes) -> Play:
    return _sent(way, *(_file_named(name) for name in names))


def _file_named(name: bytes) -> Build:
    return lambda maker: maker.root([maker.file(name)])


def _sent(way: str, *builds: Build) -> Play:
    def play(stage: Stage) -> str:
        for build in builds:
            ran, _ = WAYS[way](stage.scene, build)
            if not is_refused(ran):
                return f"not refused: {ran.told()}"
        return ""

    return play


def _applied(*commits: Build) -> Play:
    """The commits go to and fro in a working tree, which gets nothing that needs trust."""

    def play(stage: Stage) -> str:
        dot = stage.scene.make(*commits)
        stage.scene.must(stage.scene.run("clone", "evil", dot))
        tree = stage.tree(dot)
        for words in (
            ["reset", "--hard", "master~1"],
            ["undo"],
            ["restore", "HEAD~1", "--delete", "--", "."],
            ["stash", "push"],
            ["checkout", "-b", "x"],
            ["commit", "-m", "x"],
            ["merge", "master"],
        ):
            ran = stage.scene.run(words[0], "--dot", dot, *words[1:])
            if ran.is_crash or ran.code not in (0, 3, 15, 18):
                return f"dm {words[0]}: {ran.told()}"
            found = next(_untrusted(tree), "")
            if found:
                return f"dm {words[0]}: {found}"
        return ""

    return play


def _to(make: Callable[[bytes], Build], *more: Build) -> Play:
    return lambda stage: _applied(make(stage.target), *more, make(stage.target))(stage)


def _crossing(stage: Stage) -> str:
    """A link, and in the next commit a directory of its name with what is behind the link."""
    outside = stage.target
    return _applied(_links(outside), _through_links(outside), _links(outside))(stage)


def _deep_links(stage: Stage) -> str:
    """CVE-2025-4517: so many links in so long directories that the real path is cut."""

    def build(maker: TreeMaker) -> RawEntry:
        name = b"d" * 180
        entry = maker.symlink(b"l" * 180, b"../" * 20 + stage.target.lstrip(b"/"))
        for letter in b"abcdefghij":
            step = maker.symlink(bytes((letter,)), name)
            entry = maker.directory(name, [entry, step])
        escape = maker.symlink(b"escape", b"a/b/c/d/e/f/g/h/i/j/" + b"../" * 10)
        return maker.root([entry, escape])

    def through(maker: TreeMaker) -> RawEntry:
        leaf = maker.directory(b"l" * 180, [maker.file(b"leaf", b"overwritten")])
        return maker.root([maker.directory(b"escape", [leaf, maker.file(b"leaf", b"x")])])

    return _applied(build, through, build)(stage)


def _archive_members(stage: Stage) -> str:
    """CVE-2007-4559: what `dm export` packs leads nowhere, so that any tar may unpack it."""
    dot = stage.scene.make(_groups(stage.target), _links(stage.target))
    stage.scene.must(stage.scene.run("clone", "evil", dot))
    for revision in ("master", "master~1"):
        path = stage.new("archive") + ".tar"
        stage.scene.must(stage.scene.run("export", revision, path, "--dot", dot))
        with tarfile.open(path) as archive:
            for member in archive:
                parts = member.name.split("/")
                if member.name.startswith("/") or ".." in parts:
                    return f"a member {member.name}"
                if member.islnk() and (member.linkname.startswith("/") or ".." in member.linkname):
                    return f"a hard link to {member.linkname}"
    return ""


# --- trees of somebody else ----------------------------------------------------------------------


def _attached(stage: Stage, fill: Callable[[str], None]) -> tuple[str, str]:
    """A dot attached to a new directory with one commit; (dot, directory)."""
    tree = stage.new("attached")
    os.mkdir(tree)
    fill(tree)
    dot = "at" + tree.rpartition("-")[2]
    stage.scene.must(stage.scene.run("init", dot, "--at", tree))
    stage.scene.must(stage.scene.run("commit", "-m", "1", "--dot", dot))
    return dot, tree


def _write(path: str, text: str = "inside") -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        file.write(text)


def _restore_through_link(stage: Stage) -> str:
    """CVE-2023-23946: a directory of the tree has become a link before paths come back."""
    dot, tree = _attached(stage, lambda t: _write(f"{t}/below/deep"))
    os.rename(f"{tree}/below", f"{tree}/moved")
    os.symlink(stage.outside.path + "/below", f"{tree}/below")
    for words in (
        ["restore", "HEAD", "--", "__default__/below/deep"],
        ["stash", "push"],
        ["stash", "pop"],
        ["reset", "--hard", "HEAD"],
    ):
        stage.scene.run(words[0], "--dot", dot, *words[1:])
    found = os.path.islink(f"{tree}/below")
    return "the link is still there after a reset" if found else ""


def _merge_through_link(stage: Stage) -> str:
    """CVE-2023-25652: what a merge leaves for the user goes through a link of the other side."""
    target = stage.target

    def base(maker: TreeMaker) -> RawEntry:
        return maker.root([maker.directory(b"below", [maker.file(b"deep", b"base")])])

    def ours(maker: TreeMaker) -> RawEntry:
        return maker.root([maker.directory(b"below", [maker.file(b"deep", b"ours")])])

    def theirs(maker: TreeMaker) -> RawEntry:
        return maker.root([maker.symlink(b"below", target + b"/below")])

    dot = stage.scene.make(base, ours)
    stage.scene.must(stage.scene.run("clone", "evil", dot))
    stage.tree(dot)
    run = stage.scene.run
    run("checkout", "-b", "side", "master~1", "--dot", dot)
    tree = stage.tree(f"{dot}@side")
    os.unlink(f"{tree}/below/deep")
    os.rmdir(f"{tree}/below")
    os.symlink(stage.outside.path + "/below", f"{tree}/below")
    run("commit", "-m", "link", "--dot", dot)
    run("checkout", "master", "--dot", dot)
    for words in (
        ["merge", "side"],
        ["resolve", "__default__/below", "--theirs"],
        ["merge", "--abort"],
    ):
        ran = run(*words, "--dot", dot)
        if ran.is_crash:
            return ran.told()
    return ""


def _hard_linked(stage: Stage) -> str:
    """CVE-2017-18078: a file of the tree is a second name of one outside when it is written."""
    dot, tree = _attached(stage, lambda t: _write(f"{t}/leaf", "x" * 5000))
    os.unlink(f"{tree}/leaf")
    os.link(stage.outside.file, f"{tree}/leaf")
    stage.outside.remember()
    ran = stage.scene.run("reset", "--hard", "--discard", "HEAD", "--dot", dot)
    held = os.stat(stage.outside.file).st_nlink
    if ran.code != 0 or held != 1:
        return f"{ran.told()}, {held} names"
    for line in stage.outside.harm():
        if "links" not in line and "ctime" not in line:  # it has lost the name in the tree
            return line
    return ""


def _moved_directory(stage: Stage) -> str:
    """CVE-2017-1002101: the attached directory has become a link to the outside."""
    dot, tree = _attached(stage, lambda t: _write(f"{t}/leaf"))
    os.rename(tree, tree + ".old")
    os.symlink(stage.outside.path, tree)
    for words in (
        ["commit", "-m", "x"],
        ["reset", "--hard", "HEAD"],
        ["stash", "push"],
        ["status"],
    ):
        ran = stage.scene.run(*words, "--dot", dot)
        if words[0] != "status" and ran.code in (0, None):
            return f"dm {words[0]}: {ran.told()}"
    return ""


def _specials(stage: Stage) -> str:
    """Fifos without a writer, sockets and endless devices neither hang nor fail a commit."""

    def fill(tree: str) -> None:
        _write(f"{tree}/leaf")
        os.mkfifo(f"{tree}/fifo")
        os.mknod(f"{tree}/zero", stat.S_IFCHR | 0o666, os.makedev(1, 5))
        os.symlink("/dev/zero", f"{tree}/endless")
        os.symlink("/proc/kmsg", f"{tree}/kernel")
        here = os.getcwd()
        os.chdir(tree)
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("sock")
        os.chdir(here)

    began = time.monotonic()
    dot, _ = _attached(stage, fill)
    took_s = time.monotonic() - began
    ran = stage.scene.run("ls", "-l", "HEAD:__default__", "--dot", dot)
    if ran.code != 0 or b"zero" not in ran.stdout:
        return ran.told()
    return "" if took_s < HANG_S else f"took {took_s:.0f} s"


def _deep_tree(stage: Stage) -> str:
    """A tree of 20,000 directories in each other is refused, and can be removed again."""
    dot, tree = _attached(stage, lambda t: _write(f"{t}/leaf"))
    fd = os.open(tree, os.O_RDONLY)
    for _ in range(20_000):
        os.mkdir("d", dir_fd=fd)
        below = os.open("d", os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = below
    os.close(fd)
    ran = stage.scene.run("commit", "-m", "deep", "--dot", dot)
    if ran.code != 17 or ran.is_crash:
        return ran.told()
    ran = stage.scene.run("reset", "--hard", "--discard", "HEAD", "--dot", dot)
    return "" if ran.code == 0 and os.listdir(tree) == ["leaf"] else ran.told()


def _raced(race: Callable[..., None]) -> Play:
    def play(stage: Stage) -> str:
        row = Row("", "", 0, "")
        budget = stage.budget
        race(type(budget)(stage.new("race"), budget.seed, budget.count), 200, row)
        return row.failures[0] if row.failures else ""

    return play


def _export_race(stage: Stage) -> str:
    """CVE-2018-15664: a directory of the destination flips while it is written to."""
    place = stage.new("exported")
    dot = stage.scene.make(lambda m: m.root([m.directory(b"d", [m.file(b"leaf"), m.file(b"new")])]))
    stage.scene.must(stage.scene.run("clone", "evil", dot))
    os.makedirs(f"{place}/__default__/d")
    os.symlink(stage.outside.path, f"{place}/__default__/trap")
    with Flipper(f"{place}/__default__", [("d", "trap")]):
        for _ in range(5):
            ran = stage.scene.run("export", "--force", "--yes", "HEAD", place, "--dot", dot)
            if ran.is_crash:
                return ran.told()
    return ""


# --- objects -------------------------------------------------------------------------------------


def _objects(stage: Stage) -> ObjectStore:
    return ObjectStore(os.path.join(stage.new("objects"), "dots", "5a" * 16))


def _bomb(stage: Stage) -> str:
    """Ten pages that say 10^18 names: taken in no time, and not written out."""

    def build(maker: TreeMaker) -> RawEntry:
        page = maker.page([maker.file(b"f")])
        for _ in range(9):
            page = maker.page([raw(b"%03d" % number, 1, page, mode=0o755) for number in range(100)])
        return maker.directory(b"", [raw(b"__default__", 1, page, mode=0o755)])

    dot = stage.scene.make(build)
    began = time.monotonic()
    ran = stage.scene.run("clone", "evil", dot)
    told = stage.scene.run("dot", "path", dot)
    exported = stage.scene.run("export", "HEAD", stage.new("bomb"), "--dot", dot)
    took_s = time.monotonic() - began
    if ran.is_crash or 0 in (told.code, exported.code):
        return f"{ran.told()} {told.told()}"
    return "" if took_s < HANG_S else f"took {took_s:.0f} s"


def _folded(stage: Stage) -> str:
    """CVE-2024-32002 on a file system without case: the probe's answer is played."""
    objects = _objects(stage)
    tree = stage.new("folding")
    os.mkdir(tree)
    with objects.writer() as writer:
        maker = TreeMaker(writer)
        value = maker.root(
            [
                maker.directory(b"A", [maker.file(b"leaf", b"planted")]),
                maker.symlink(b"a", stage.target),
            ]
        )
        writer.seal()
    honest = getattr(restore, "not_told_apart")  # noqa: B009 - the answer of the probe
    setattr(restore, "not_told_apart", lambda fd, names: set(names[1:]))  # noqa: B010
    try:
        result = restore_tree(
            tree_path=tree,
            as_subdot=b"__default__",
            store=objects,
            target=entry_from_value(value),
            current=None,
            stat_cache=None,
            now_ns=1,
        )
    finally:
        setattr(restore, "not_told_apart", honest)  # noqa: B010
        objects.close()
    return "" if os.listdir(tree) == ["A"] and result.withheld else f"made {os.listdir(tree)}"


def _decoded(*pages: bytes) -> Play:
    """Bytes that are no page: refused at once, in little memory."""

    def play(stage: Stage) -> str:
        for data in pages:
            began = time.monotonic()
            with suppress(BadObject):
                decode_page(data, DIRECTORY)
                return f"{data[:20]!r} was taken"
            if time.monotonic() - began > 2:
                return f"{data[:20]!r} took {time.monotonic() - began:.1f} s"
        return ""

    return play


def _shifted(stage: Stage) -> str:
    """A chunk's id in the place of a page's, and the other way round."""
    objects = _objects(stage)
    try:
        with objects.writer() as writer:
            page = TreeMaker(writer).page([raw(b"p", 3)])
            chunk = writer.put(Kind.CHUNK, b"chunk")
            writer.seal()
        for kind, oid in ((Kind.PAGE, chunk), (Kind.CHUNK, page)):
            with suppress(DmError):
                objects.read(kind, oid)
                return "an object of another kind was given"
    finally:
        objects.close()
    return ""


def _ref_names(stage: Stage) -> str:
    """A server's list of refs with names that are paths."""
    for name in (
        "branch/../../x",
        "branch//x",
        "../x",
        "branch/x\n",
        "tag/..",
        "config",
        "branch/-x",
    ):
        payload = encode(((((name, b"\x11" * 32, None)),), None, False, None, None))
        with suppress(ProtocolError):
            message_from_frame(Frame(RefsReply.TYPE, Flag.NONE, payload))
            return f"{name!r} was taken"
    return ""


CONTENT_CASES: Final = (
    Case("dulwich CVE-2026-42305", "absolute and dotted paths", "refused where they arrive",
         _names("push", b"/etc/passwd", b"..", b"../x", b"a/../../x")),
    Case("zip-slip CVE-2018-1002200", "names that climb, in an archive", "refused from a file too",
         _names("bundle", b"../../x", b"..//x", b"x/..")),
    Case("tar CVE-2001-1267", "a name that ends in /..", "refused", _names("fetch", b"x/..", b".")),
    Case("git CVE-2014-9390", ".GIT is .git elsewhere", "nothing of a tree is settings or store",
         _applied(_plain, lambda m: m.root([m.directory(n, [m.file(b"config", b"[core]")])
                  for n in (b".GIT", b".git", b".Git", b"git~1", b".g\xe2\x80\x8cit")]), _plain)),
    Case("git CVE-2019-1352", "names of NTFS streams", "bytes, made as they are or not at all",
         _applied(_plain, lambda m: m.root([m.file(n) for n in
                  (b"x::$INDEX_ALLOCATION", b"x:y", b"con", b"aux.txt", b"nul ")]), _plain)),
    Case("git CVE-2019-1354", "backslashes in names", "no separator here",
         _applied(_plain, lambda m: m.root([m.file(n) for n in
                  (b"..\\..\\x", b"\\x", b"C:\\x", b"\\\\h\\s")]), _plain)),
    Case("git CVE-2021-21300", "a link and a directory that fold into one", "each stays itself",
         lambda stage: _applied(_plain, lambda m: m.root([m.symlink(b"a", stage.target),
             m.directory(b"A", [m.file(b"leaf", b"x")])]), _plain)(stage)),
    Case("git CVE-2024-32002", "the same, without case", "the second name waits", _folded),
    Case("hg CVE-2017-1000115", "a link, then files behind it", "never followed", _crossing),
    Case("hg PYSEC-2019-188", "the same three levels down", "never followed",
         lambda stage: _applied(_through_links(stage.target), _links(stage.target),
                                _through_links(stage.target))(stage)),
    Case("node-tar CVE-2021-32803", "a directory replaced by a link in one archive",
         "one name, one entry", _refused("clone", "a link and a directory of one name")),
    Case("node-tar CVE-2021-37701", "the same, hidden between pages", "checked over all pages",
         _refused("pull", "a link in one page, a directory in another", "twice in two pages")),
    Case("borg CVE-2016-10099", "a second entry of one name", "refused",
         _refused("push", "twice in a page", "unsorted", "pages that overlap")),
    Case("borg CVE-2023-36811", "an object passed off as another", "kinds have ids of their own",
         _refused("bundle", "a manifest as a directory", "a directory as a manifest")),
    Case("git SHA-1 collisions", "an object of another kind under an id", "never given", _shifted),
    Case("borg CVE-2026-62268", "a hard link to a link", "an inode of its own, links not followed",
         _to(_groups, _plain)),
    Case("git CVE-2024-32021", "hard links to what lies outside", "groups are names in the tree",
         _refused("clone", "a group outside", "a group above", "a group with dots")),
    Case("rsync CVE-2026-53795", "a group of several kinds", "refused",
         _refused("push", "a group of a link and a file", "a directory in a group")),
    Case("git CVE-2023-23946", "writing paths behind a link", "the link is replaced",
         _restore_through_link),
    Case("git CVE-2023-25652", "what a merge leaves goes through a link", "never followed",
         _merge_through_link),
    Case("systemd CVE-2017-18078", "a second name of a file outside is written", "a new inode",
         _hard_linked),
    Case("kubernetes CVE-2017-1002101", "the volume's directory is a link", "refused",
         _moved_directory),
    Case("kubernetes CVE-2021-25741", "directories swapped while they are walked", "by descriptor",
         _raced(race_restores)),
    Case("rsync CVE-2026-53797", "the sender leaks what a swapped name leads to", "by descriptor",
         _raced(race_scans)),
    Case("docker CVE-2018-15664", "copying into a directory that flips", "by descriptor",
         _export_race),
    Case("tarfile CVE-2007-4559", "members that climb", "archives hold none", _archive_members),
    Case("tarfile CVE-2025-4517", "real paths too long to be checked", "no path is resolved",
         _deep_links),
    Case("cp FIFO", "a fifo, a socket or a device hangs who reads", "looked at, never opened",
         _specials),
    Case("git core.maxTreeDepth", "trees too deep for recursion", "bounded, no recursion",
         _refused("clone", "2049 directories deep")),
    Case("git CVE-2016-2315", "paths of any length", "4,096 bytes",
         _refused("push", "a path of 4097 bytes")),
    Case("rm depth", "directories 20,000 deep in a tree", "refused, and removable", _deep_tree),
    Case("git bomb", "ten objects, 10^18 files", "linear to take, not written out", _bomb),
    Case("overlayfs CVE-2023-0386", "trusted.* and set-id bits come along", "wait for trust",
         _applied(_kinds, _plain, _kinds)),
    Case("git CVE-2022-23521", "numbers of attributes overflow", "64 of 64 KiB",
         _refused("fetch", "65 attributes", "an attribute of 64 KiB and one")),
    Case("rsync CVE-2024-12084", "a checksum of another length", "ids have 32 bytes",
         _sent("push", lambda m: m.root([raw(b"f", 0, (5, b"\x11" * 64, 1, None, 0))]),
               lambda m: m.root([raw(b"f", 0, (5, b"\x11" * 16, 1, None, 0))]))),
    Case("dulwich 1.2.8 lengths", "negative lengths", "refused",
         _refused("bundle", "a size below zero", "a mode below zero", "a device below zero")),
    Case("dulwich 1.2.5 sizes", "a size that the content has not", "what it says is hashed",
         _refused("pull", "a shorter size", "a longer size", "a size that its chunk has not")),
    Case("sparse zip bomb", "exabytes of holes", "64 TiB a file, in no time",
         _refused("clone", "an exbibyte of zeros", "an exbibyte of hole in a manifest")),
    Case("git index-pack offsets", "pieces that do not lie where they say", "aligned, weighed",
         _refused("push", "a fixed file out of step", "a manifest of another weight")),
    Case("rsync CVE-2026-43618", "more entries than were announced", "counts are compared",
         _refused("fetch", "a page with another weight", "too many entries", "an empty page")),
    Case("dulwich loops", "pages that stand on no level", "levels descend by one",
         _refused("bundle", "levels that do not descend", "a level above all")),
    Case("git fsck zero-padded modes", "two encodings of one value", "one encoding only",
         _refused("push", "an integer in too many bytes")),
    Case("msgpack CVE-2024-48924", "deep nesting, huge counts", "refused before anything is made",
         _decoded(b"\x91" * 2000, b"\xdd\xff\xff\xff\xff" * 200,
                  b"\x93\x01\x00" + b"\xdd" + b"\xff" * 4,
                  b"\xc6\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xc9\xff\xff\xff\xff\x01")),
    Case("git CVE-2025-48385", "a server's refs write elsewhere", "names of one alphabet",
         _ref_names),
)  # fmt: skip
