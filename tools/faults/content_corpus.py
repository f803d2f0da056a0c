"""Names, links, modes, attributes, sizes and pages as somebody sends them who means harm."""

from collections.abc import Callable
from typing import Any, Final

from dmsync.core.chunking import SEGMENT_BYTES, FileHasher
from dmsync.core.encoding import encode
from dmsync.core.ids import Kind, ObjectId
from dmsync.core.objects import Layout
from dmsync.core.pages import MANIFEST, ZERO_RUN
from tools.faults.hostile_trees import (
    BLOCK,
    CHARACTER,
    DIRECTORY,
    FIFO,
    FILE,
    SUBDOT,
    SYMLINK,
    RawEntry,
    TreeMaker,
    raw,
)

Build = Callable[[TreeMaker], RawEntry]
EXBIBYTE: Final = 1 << 60
SEGMENT: Final = SEGMENT_BYTES

# --- names ---------------------------------------------------------------------------------------


def _refused_names() -> list[bytes]:
    names = [b"", b".", b"..", b"/", b"//", b"\0", b"a\0", b"\0a", b"..\0", b"../x", b"./x", b"x/"]
    names += [b"/etc/passwd", b"../../../../etc/passwd", b"a/b", b"a//b", b"a/../b", b"..//x"]
    names += [b"x" * 256, b"x" * 4096, b"\xc3\xa9" * 128, b"../" * 80 + b"x", b"/dev/shm/x"]
    names += [b".git/hooks/x", b"x/..", b"\n/", b"-/x", b"C:/x", b"~/x", b"\\/x", b"x\0.txt"]
    names += [b".dm-tmp-" + digits for digits in (b"0" * 16, b"0123456789abcdef", b"f" * 16)]
    for byte in range(1, 256, 5):
        names.append(bytes((byte, 47, byte)))
    return [name for name in dict.fromkeys(names) if _is_bad(name)]


def _is_bad(name: bytes) -> bool:
    return (
        not 0 < len(name) <= 255
        or name in (b".", b"..")
        or b"/" in name
        or b"\0" in name
        or name.startswith(b".dm-tmp-")
    )


def _odd_names() -> list[bytes]:
    names: list[bytes] = [
        *(b".git", b".GIT", b".Git", b"git~1", b"GIT~2", b".g\xe2\x80\x8cit", b".gi\xcc\x81t"),
        *(b".dm", b".dm-tmp-", b".dm-tmp-xyz", b".dm-tmp-0123456789ABCDEF", b"lock", b"format"),
        *(b"...", b"....", b". ", b".. ", b" ..", b"..\r", b"..\n", b"\r..", b"..\t", b"x\r"),
        *(b"con", b"CON", b"aux.txt", b"nul", b"prn", b"com1", b"lpt9", b"x:", b"x::$DATA"),
        *(b"C:\\x", b"\\x", b"..\\x", b"..\\..\\x", b"\\\\host\\share", b"x\\..\\..\\y"),
        *(b"~", b"~root", b"-", b"-rf", b"--help", b"--trusted", b"-oProxyCommand=x", b"@", b"*"),
        *(b"$(touch x)", b"`touch x`", b"%P", b"%s%n", b";x", b"|x", b"&x", b">x", b"<x", b"!x"),
        *(b"'x'", b'"x"', b"${HOME}", b"$HOME", b"#x", b"x y", b" ", b"\t", b"  x  "),
        *(b"\x1b[31m", b"\x1b]0;x\x07", b"\x9b31m", b"\xc2\x9b31m", b"\x07", b"\x08\x08"),
        *(b"\xe2\x80\xae", b"\xe2\x81\xa6", b"\xe2\x80\xa8", b"\xe2\x80\xa9", b"\xef\xbb\xbf"),
        *(b"caf\xc3\xa9", b"cafe\xcc\x81", b"STRASSE", b"stra\xc3\x9fe", b"\xc4\xb0", b"\xc4\xb1"),
        *(b"\xe2\x80\xa4\xe2\x80\xa4", b"\xef\xbc\x8e\xef\xbc\x8e", b"\xef\xbc\x8f", b"\xc0\xae"),
        *(b"\xc0\xae\xc0\xae", b"\xc0\xaf", b"\xff", b"\xfe\xff", b"\xed\xa0\x80", b"\xf8\x88"),
        *(b"x" * 255, b"\xc3\xa9" * 127, b"\xff" * 255, b"." * 255, b" " * 255, b"\n" * 255),
        *(b"[core]", b"hooks", b"config.toml", b".gitmodules", b".hgsub", b".bashrc", b"Makefile"),
        *(b"a", b"A", b"readme", b"README", b"Readme"),
    ]
    names += [b"c%bc" % bytes((byte,)) for byte in range(1, 32)] + [b"c\x7fc"]
    names += [b"h%bh" % bytes((byte,)) for byte in range(128, 256)]
    names += [b"\xc2%b" % bytes((byte,)) for byte in range(0x80, 0xA0)]
    return [name for name in dict.fromkeys(names) if not _is_bad(name)]


REFUSED_NAMES: Final = _refused_names()
ODD_NAMES: Final = _odd_names()
"""Safe in a directory, whatever they do to shells, terminals and other file systems."""
KINDS: Final = ("file", "directory", "symlink", "fifo", "device", "hardlink")


def named(maker: TreeMaker, name: bytes, kind: str, outside: bytes) -> list[RawEntry]:
    """An entry of that name and kind, aimed at the directory `outside`."""
    match kind:
        case "file":
            return [maker.file(name, b"hostile")]
        case "directory":
            return [maker.directory(name, [maker.file(b"leaf", b"hostile")])]
        case "symlink":
            return [maker.symlink(name, outside + b"/leaf")]
        case "fifo":
            return [raw(name, FIFO)]
        case "device":
            return [raw(name, CHARACTER, (1, 3), mode=0o666)]
    group = SUBDOT + b"/!first"
    return [
        maker.symlink(b"!first", outside + b"/leaf", hardlink=group),
        maker.symlink(name, outside + b"/leaf", hardlink=group),
    ]


# --- what no receiver may take -------------------------------------------------------------------


def _content(data: bytes) -> bytes:
    hasher = FileHasher()
    hasher.update(data)
    return hasher.content()


def _file_of(maker: TreeMaker, parts: list[Any], layout: Layout, **claims: Any) -> RawEntry:
    """A file with a manifest of `parts` (bytes, or a number of zeros), and what it claims instead:
    size, content, tree."""
    data, lengths, ids = b"", list[int](), list[bytes]()
    for part in parts:
        if isinstance(part, int):
            ids.append(ZERO_RUN)
            lengths.append(part)
            data += bytes(part) if part < 1 << 24 else b""
        else:
            ids.append(maker.writer.put(Kind.CHUNK, part))
            lengths.append(len(part))
            data += part
    tree = claims.get("tree") or maker.manifest(claims.get("lengths", lengths), ids)
    size = claims.get("size", sum(lengths))
    content = claims.get("content") or _content(data)
    return raw(b"f", FILE, (size, content, int(layout), tree, 0))


def _noise(seed: int, size: int = SEGMENT) -> bytes:
    import random

    return random.Random(seed).randbytes(size)


A, B, C = _noise(1), _noise(2), _noise(3, 1000)


def _leaves(maker: TreeMaker, *leaves: list[RawEntry], **claims: Any) -> RawEntry:
    """A directory of several leaf pages; `keys` and `weights` are what the page above says."""
    pages = [maker.page(leaf, level=claims.get("leaf_level", 0)) for leaf in leaves]
    keys = claims.get("keys", [leaf[0][0] for leaf in leaves])
    weights = claims.get("weights", [len(leaf) for leaf in leaves])
    top = maker.page(
        [(k, p, w) for k, p, w in zip(keys, pages, weights, strict=True)],
        level=claims.get("level", 1),
    )
    return raw(b"d", DIRECTORY, top, mode=0o755)


def _in(build: Callable[[TreeMaker], RawEntry]) -> Build:
    return lambda maker: maker.root([build(maker)])


def _entry(*arguments: Any, **more: Any) -> Build:
    return _in(lambda maker: raw(*arguments, **more))


def _with(**more: Any) -> Build:
    return _in(lambda maker: maker.file(b"f", **more))


def _chain(maker: TreeMaker, names: list[bytes]) -> RawEntry:
    entry = maker.file(b"f")
    for name in reversed(names):
        entry = maker.directory(name, [entry])
    return maker.root([entry])


def _f(maker: TreeMaker, name: bytes) -> RawEntry:
    return maker.file(name)


REFUSED: Final[dict[str, Build]] = {
    # order and pages
    "unsorted": lambda m: _top(m, m.page([_f(m, b"b"), _f(m, b"a")])),
    "twice in a page": lambda m: _top(m, m.page([_f(m, b"a"), m.symlink(b"a", b"/etc")])),
    "a link and a directory of one name": lambda m: _top(
        m, m.page([m.symlink(b"a", b"/etc"), m.directory(b"a", [_f(m, b"passwd")])])
    ),
    "twice in two pages": _in(
        lambda m: _leaves(m, [_f(m, b"a"), _f(m, b"m")], [_f(m, b"m"), _f(m, b"z")])
    ),
    "a link in one page, a directory in another": _in(
        lambda m: _leaves(
            m,
            [m.symlink(b"a", b"/etc")],
            [m.directory(b"a", [_f(m, b"passwd")])],
            keys=[b"a", b"b"],
        )
    ),
    "pages that overlap": _in(
        lambda m: _leaves(m, [_f(m, b"a"), _f(m, b"z")], [_f(m, b"b"), _f(m, b"c")])
    ),
    "a page with another key": _in(
        lambda m: _leaves(m, [_f(m, b"a")], [_f(m, b"b")], keys=[b"a", b"aa"])
    ),
    "a page with another weight": _in(
        lambda m: _leaves(m, [_f(m, b"a")], [_f(m, b"b")], weights=[1, 5])
    ),
    "keys out of order": _in(lambda m: _leaves(m, [_f(m, b"b")], [_f(m, b"a")], keys=[b"b", b"a"])),
    "levels that do not descend": _in(lambda m: _leaves(m, [_f(m, b"a")], [_f(m, b"b")], level=3)),
    "a level above all": _in(lambda m: _leaves(m, [_f(m, b"a")], level=9)),
    "an empty page": lambda m: _top(m, m.page([])),
    "too many entries": lambda m: _top(m, m.page([raw(b"%05d" % n, FIFO) for n in range(1025)])),
    "a manifest as a directory": lambda m: _top(
        m, m.manifest([1000], [m.writer.put(Kind.CHUNK, C)])
    ),
    "a directory as a manifest": _in(
        lambda m: _file_of(m, [A, B], Layout.FIXED, tree=m.page([_f(m, b"a")]))
    ),
    "a page of another type": lambda m: _top(m, m.page([_f(m, b"a")], kind=7)),
    "an integer in too many bytes": lambda m: _top(
        m, m.writer.put(Kind.PAGE, b"\x93\xcd\x00\x01" + encode((0, (_f(m, b"a"),)))[1:])
    ),
    # entries
    "a kind nobody knows": _entry(b"f", 6),
    "a mode of more than twelve bits": _with(mode=0o10000),
    "a mode below zero": _with(mode=-1),
    "an owner beyond 32 bits": _with(uid=1 << 32),
    "an owner below zero": _with(gid=-1),
    "a time beyond 64 bits": _with(mtime_ns=1 << 63),
    "a link to nothing": _entry(b"l", SYMLINK, b""),
    "a link with NUL": _entry(b"l", SYMLINK, b"/etc\0/x"),
    "a link of 4096 bytes": _entry(b"l", SYMLINK, b"x" * 4096),
    "a fifo with content": _entry(b"p", FIFO, b"x"),
    "a device of three numbers": _entry(b"d", BLOCK, (8, 0, 0)),
    "a device below zero": _entry(b"d", CHARACTER, (-1, 0)),
    "a directory that is bytes": _entry(b"d", DIRECTORY, b"short"),
    "a critical extension": _with(extensions=((1, b"x"),)),
    "extensions unsorted": _with(extensions=((4, b"x"), (2, b"x"))),
    # attributes
    "65 attributes": _with(xattrs=tuple((b"user.%03d" % n, b"") for n in range(65))),
    "an attribute of 64 KiB and one": _with(xattrs=((b"user.x", bytes(65537)),)),
    "attributes unsorted": _with(xattrs=((b"user.b", b""), (b"user.a", b""))),
    "an attribute twice": _with(xattrs=((b"user.a", b""), (b"user.a", b"x"))),
    "an attribute without name": _with(xattrs=((b"", b"x"),)),
    "an attribute with NUL": _with(xattrs=((b"user.\0", b"x"),)),
    "an attribute of 256 bytes' name": _with(xattrs=((b"user." + b"x" * 251, b"x"),)),
    # hardlinks
    "a group outside": _with(hardlink=b"/etc/passwd"),
    "a group above": _with(hardlink=b"../../etc/passwd"),
    "a group with dots": _with(hardlink=b"__default__/../x"),
    "a group with an empty name": _with(hardlink=b"__default__//x"),
    "a group of 4097 bytes": _with(hardlink=b"/".join([b"x" * 240] * 17)),
    "a group named by a later path": _with(hardlink=SUBDOT + b"/zzz"),
    "a directory in a group": _entry(b"d", DIRECTORY, None, hardlink=SUBDOT + b"/a"),
    "a group of a link and a file": lambda m: m.root(
        [
            m.symlink(b"a", b"/etc/passwd", hardlink=SUBDOT + b"/a"),
            m.file(b"b", hardlink=SUBDOT + b"/a"),
        ]
    ),
    # files
    "a size that its chunk has not": _in(
        lambda m: raw(b"f", FILE, (999, m.writer.put(Kind.CHUNK, C), 1, None, 0))
    ),
    "a single chunk of two segments": _in(
        lambda m: raw(b"f", FILE, (2 * SEGMENT, m.writer.put(Kind.CHUNK, A + B), 1, None, 0))
    ),
    "an empty file of five bytes": _entry(b"f", FILE, (5, b"", 0, None, 0)),
    "a size below zero": _entry(b"f", FILE, (-1, b"", 4, None, 0)),
    "a size beyond 63 bits": _entry(b"f", FILE, (1 << 63, b"", 4, None, 1)),
    "an exbibyte of zeros": _entry(b"f", FILE, (EXBIBYTE, b"", 4, None, 1)),
    "an exbibyte of hole in a manifest": _in(lambda m: _file_of(m, [EXBIBYTE, A], Layout.FIXED)),
    "a shorter size": _in(lambda m: _file_of(m, [A, B, C], Layout.FIXED, size=2 * SEGMENT)),
    "a longer size": _in(lambda m: _file_of(m, [A, B, C], Layout.FIXED, size=3 * SEGMENT)),
    "another content": _in(lambda m: _file_of(m, [A, B], Layout.FIXED, content=_content(A + C))),
    "spans longer than chunks": _in(
        lambda m: _file_of(m, [A, C], Layout.CDC, lengths=[SEGMENT, 2000])
    ),
    "a span of nothing": _in(
        lambda m: _file_of(m, [A, B, C], Layout.CDC, lengths=[SEGMENT, SEGMENT, 0])
    ),
    "a span of two MiB": _in(lambda m: _file_of(m, [A, B], Layout.CDC, lengths=[SEGMENT, 1 << 21])),
    "zeros in two runs": _in(lambda m: _file_of(m, [A, SEGMENT, SEGMENT, B], Layout.FIXED)),
    "nothing but zeros": _in(lambda m: _file_of(m, [3 * SEGMENT], Layout.FIXED)),
    "a fixed file out of step": _in(lambda m: _file_of(m, [A, C, B], Layout.FIXED)),
    "a fixed file of two sizes": _in(lambda m: _file_of(m, [A, A + B, B], Layout.FIXED)),
    "a fixed file with a hole out of step": _in(lambda m: _file_of(m, [A, 1000, B], Layout.FIXED)),
    "a manifest of another weight": _in(lambda m: _tilted(m)),
    # shapes
    "2049 directories deep": lambda m: _chain(m, [b"d"] * 2049),
    "a path of 4097 bytes": lambda m: _chain(m, [b"x" * 255] * 16),
}


def _top(maker: TreeMaker, page: ObjectId) -> RawEntry:
    """A root whose default subdot is this page."""
    return maker.directory(b"", [raw(SUBDOT, DIRECTORY, page, mode=0o755)])


def _tilted(maker: TreeMaker) -> RawEntry:
    """Two leaves, of which the page above says that the first is longer, the second shorter."""
    leaves = [maker.manifest([SEGMENT], [maker.writer.put(Kind.CHUNK, part)]) for part in (A, B)]
    weights = (SEGMENT + 4096, SEGMENT - 4096)
    items = [(b"", leaf, weight) for leaf, weight in zip(leaves, weights, strict=True)]
    tree = maker.page(items, level=1, kind=MANIFEST)
    return _file_of(maker, [A, B], Layout.FIXED, tree=tree)
