"""Content that may be recorded, and must do no harm when it is applied: every command that writes a
tree, on trees that hold all of it."""

import os
import stat
import time
from collections.abc import Callable, Iterator

from dmsync.core.ids import Kind, ObjectId
from dmsync.core.objects import Layout
from dmsync.core.pages import walk_tree
from tools.faults.content_corpus import KINDS, ODD_NAMES, Build, named
from tools.faults.hostile_trees import (
    BLOCK,
    CHARACTER,
    FIFO,
    SUBDOT,
    HostileStore,
    RawEntry,
    TreeMaker,
    raw,
)
from tools.faults.receiving import Scene
from tools.faults.row import Budget, Row
from tools.faults.sentinels import CANARY, Outside

FORBIDDEN_ATTRIBUTES = ("security.capability", "security.evil", "trusted.evil")


def apply_everything(budget: Budget, scene: Scene, outside: Outside, row: Row) -> None:
    """Each tree is cloned and then goes through all commands; after each the canaries are looked at
    and the tree is searched for what needs trust."""
    target = outside.path.encode()
    trees: dict[str, list[Build]] = {
        "links": [_links(target), _through_links(target), _links(target), _plain],
        "kinds": [_kinds, _plain, _kinds],
        "groups": [_groups(target), _plain, _groups(target)],
    }
    step = len(ODD_NAMES) // (1 if budget.is_long else 2)
    for kind in KINDS[:-1]:
        for start in range(0, len(ODD_NAMES), step):
            names = ODD_NAMES[start : start + step]
            if budget.is_long or kind in ("file", "symlink"):
                trees[f"{kind} {start}"] = [_plain, _of_names(names, kind, target), _plain]
    for what, commits in trees.items():
        if budget.deadline_s is not None and time.monotonic() > budget.deadline_s:
            break
        _apply(scene, outside, row, what, commits)


def _apply(scene: Scene, outside: Outside, row: Row, what: str, commits: list[Build]) -> None:
    name = scene.make(*commits)
    cases = len(ODD_NAMES) // 2 if what[-1].isdigit() else 20
    tree = os.path.join(scene.directory, f"tree-{name}")
    for words in _commands(scene, name, tree):
        ran = scene.run_evil(*words[1:]) if words[0] == "evil" else scene.run(*words)
        row.tried += cases
        command = words[1] if words[0] == "evil" else words[0]
        row.counts[command] = int(row.counts.get(command, 0)) + cases
        if ran.is_crash or (ran.code not in (0, 3, 15, 18) and words[:2] != ["stash", "pop"]):
            row.lost(f"{what}: dm {' '.join(words)}: {ran.told()}")
        for line in outside.harm():
            row.lost(f"{what}: dm {' '.join(words)}: outside: {line}")
        for line in _untrusted(tree):
            row.lost(f"{what}: dm {' '.join(words)}: {line}")
    for line in _leaked(scene, name):
        row.lost(f"{what}: {line}")


def _commands(scene: Scene, name: str, tree: str) -> Iterator[list[str]]:
    """Every command that writes a tree, and those that read it. The dot has at least three commits
    on master; what is cloned is the last but one, so that more can come."""
    at = ["--dot", name]
    yield ["clone", "evil", name]
    yield ["export", "master", tree, *at]
    yield ["export", "--force", "--yes", "master~1", tree, *at]
    yield ["export", "master~1", tree + ".tar", *at]
    yield ["dot", "path", name]
    yield ["reset", "--hard", "master~1", *at]
    yield ["status", *at]
    yield ["reset", "--hard", "master~1", *at]
    yield ["undo", *at]
    yield ["checkout", "-b", "side", "master~1", *at]
    yield ["restore", "master", *at, "--delete", "--", "."]
    yield ["stash", "push", *at]
    yield ["stash", "pop", *at]
    yield ["commit", "-m", "as it is", *at]
    yield ["checkout", "master", *at]
    yield ["merge", "side", "--theirs", *at]
    yield ["cherry-pick", "side", *at]
    yield ["reset", "--hard", "master", *at]
    yield ["revert", "master~1", *at]
    yield ["diff", "--stat", "master~1", *at]
    yield ["push", "evil", name, "side"]
    yield ["pull", "evil", name, "--force"]
    yield ["bundle", "create", tree + ".dmb", *at]
    yield ["log", "--stat", *at]
    yield ["fsck", "--full"]


# --- trees ---------------------------------------------------------------------------------------


def _plain(maker: TreeMaker) -> RawEntry:
    return maker.root([maker.file(b"plain"), maker.directory(b"a", [maker.file(b"leaf", b"x")])])


def _links(outside: bytes) -> Build:
    """Links out of the tree under names that the other tree has as directories."""

    def build(maker: TreeMaker) -> RawEntry:
        up = b"../" * 40
        return maker.root(
            [
                maker.symlink(b"a", outside),
                maker.symlink(b"b", b"."),
                maker.symlink(b"c", b".."),
                maker.symlink(b"d", b"a"),
                maker.symlink(b"e", up + outside.lstrip(b"/")),
                maker.symlink(b"f", b"f"),
                maker.symlink(b"g", b"/proc/self/root" + outside),
                maker.symlink(b"h", b"/proc/self/cwd"),
                maker.symlink(b"i", outside + b"/leaf"),
                maker.symlink(b"j", b"x" * 4095),
                maker.symlink(b"k", b"/dev/fd/0"),
                maker.directory(b"n", [maker.directory(b"n", [maker.symlink(b"a", outside)])]),
            ]
        )

    return build


def _through_links(outside: bytes) -> Build:
    """The same names as directories with what is at the links' targets."""

    def build(maker: TreeMaker) -> RawEntry:
        def inside(name: bytes) -> RawEntry:
            return maker.directory(
                name,
                [
                    maker.file(b"leaf", b"overwritten"),
                    maker.file(b"new", b"planted"),
                    maker.directory(b"below", [maker.file(b"deep", b"overwritten")]),
                ],
            )

        entries = [inside(bytes((name,))) for name in b"abcdefgh"]
        entries += [maker.file(b"i", b"overwritten"), maker.file(b"j"), inside(b"k")]
        entries.append(maker.directory(b"n", [maker.directory(b"n", [inside(b"a")])]))
        return maker.root(entries)

    return build


def _kinds(maker: TreeMaker) -> RawEntry:
    capability = b"\x01\x00\x00\x02\xff\xff\xff\xff\x00\x00\x00\x00\xff\xff\xff\xff\x00\x00\x00\x00"
    entries = [
        raw(b"null", CHARACTER, (1, 3), mode=0o666),
        raw(b"mem", CHARACTER, (1, 1), mode=0o666),
        raw(b"disk", BLOCK, (8, 0), mode=0o666),
        raw(b"loop", BLOCK, (7, 0), mode=0o6777),
        raw(b"far", CHARACTER, (2**32 - 1, 2**32 - 1)),
        raw(b"pipe", FIFO, mode=0o6777),
        maker.file(b"all bits", b"#!/bin/sh\nid\n", mode=0o7777, uid=0, gid=0),
        maker.file(b"capable", b"x", mode=0o755, xattrs=((b"security.capability", capability),)),
        maker.file(b"labelled", b"x", xattrs=((b"security.evil", b"x"), (b"user.fine", b"y"))),
        maker.file(b"trusted", b"x", xattrs=((b"trusted.evil", b"x"),)),
        maker.file(b"overlay", b"x", xattrs=((b"trusted.overlay.redirect", b"/etc"),)),
        maker.file(b"nobody's", b"x", uid=65534, gid=65534),
        maker.file(b"far owner", b"x", uid=2**32 - 2, gid=2**32 - 2),
        maker.file(b"no rights", b"x", mode=0),
        maker.file(b"before time", b"x", mtime_ns=-(2**63)),
        maker.file(b"after time", b"x", mtime_ns=2**63 - 1),
        maker.file(b"odd", b"x", extensions=((2, b"ignored"),)),
        maker.directory(b"set", [maker.file(b"x")], mode=0o7777),
        maker.directory(b"shut", [maker.file(b"x")], mode=0),
        raw(b"holes", 0, (1 << 40, b"", 4, None, 1)),
    ]
    return maker.root(entries)


def _groups(outside: bytes) -> Build:
    """Hardlink groups that are none."""

    def build(maker: TreeMaker) -> RawEntry:
        def group(name: bytes) -> dict[str, bytes]:
            return {"hardlink": SUBDOT + b"/" + name}

        return maker.root(
            [
                maker.symlink(b"a1", outside + b"/leaf", **group(b"a1")),
                maker.symlink(b"a2", outside + b"/leaf", **group(b"a1")),
                maker.file(b"b1", b"one", **group(b"b1")),
                maker.file(b"b2", b"another", **group(b"b1")),
                maker.file(b"c2", b"alone", **group(b"c1")),
                maker.file(b"d1", b"same", mode=0o600, **group(b"d1")),
                maker.file(b"d2", b"same", mode=0o666, **group(b"d1")),
                maker.symlink(b"e0", outside),
                maker.file(b"e1", b"x", **group(b"e0/leaf")),
            ]
        )

    return build


def _of_names(names: list[bytes], kind: str, outside: bytes) -> Build:
    def build(maker: TreeMaker) -> RawEntry:
        entries: dict[bytes, RawEntry] = {}
        for name in names:
            for entry in named(maker, name, kind, outside):
                entries[entry[0]] = entry
        # in pages as an honest dm cuts them, but for where they end
        ordered = sorted(entries.values(), key=lambda entry: bytes(entry[0]))
        leaves = [ordered[at : at + 64] for at in range(0, len(ordered), 64)]
        pages = [(leaf[0][0], maker.page(leaf), len(leaf)) for leaf in leaves]
        return maker.root([raw(b"odd", 1, maker.page(pages, level=1), mode=0o755)])

    return build


# --- looking -------------------------------------------------------------------------------------


def _walk(tree: str, see: Callable[[str, os.stat_result], str]) -> Iterator[str]:
    for above, folders, files in os.walk(tree.encode()):
        for name in folders + files:
            path = os.path.join(above, name)
            problem = see(os.fsdecode(path), os.lstat(path))
            if problem:
                yield f"{path!r}: {problem}"


def _untrusted(tree: str) -> Iterator[str]:
    """What is in a tree that only trust may put there."""

    def see(path: str, status: os.stat_result) -> str:
        if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
            return "is a device"
        if not stat.S_ISLNK(status.st_mode) and status.st_mode & 0o6000:
            return "has a set-id bit"
        found = set(os.listxattr(path, follow_symlinks=False))
        return "has an attribute for the kernel" if found & {*FORBIDDEN_ATTRIBUTES} else ""

    return _walk(tree, see)


def _leaked(scene: Scene, name: str) -> Iterator[str]:
    """Bytes of the outside in any file that the honest store holds of the dot."""
    listed = scene.run("dot", "path", name).stdout.strip()
    if not listed:
        return
    yield from _untrusted(os.fsdecode(listed))
    with HostileStore(scene.good) as good:
        dot = good.store.catalog.dot_by_name("", name)
        if dot is None:
            return
        objects = good.store.objects(dot.dot)
        for row in good.store.catalog.refs(dot.dot):
            for path, entry in walk_tree(objects, good.store.root(dot.dot, row.target)):
                if entry.layout is not Layout.SINGLE:
                    continue
                if CANARY in objects.read(Kind.CHUNK, ObjectId(entry.content)):
                    yield f"{path!r} holds bytes of the outside"
