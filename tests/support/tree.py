"""What a directory tree is, in a form two trees can be compared by."""

import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

HASH_READ_BYTES = 1024 * 1024

Facts = dict[str, object]


def describe_tree(root: Path, *, owners: bool = True) -> dict[bytes, Facts]:
    """Every path below `root` with all that a commit must keep of it; sorted by path.

    `owners` may be left out where a plain user restored the tree.
    """
    base = os.fsencode(root)
    groups: dict[tuple[int, int], bytes] = {}
    described: dict[bytes, Facts] = {}
    for path in sorted(_paths(base)):
        described[os.path.relpath(path, base)] = _facts(path, base, groups, owners)
    return described


def tree_hash(root: Path, *, owners: bool = True) -> str:
    """One SHA-256 over `describe_tree`."""
    return hashlib.sha256(repr(describe_tree(root, owners=owners)).encode()).hexdigest()


def file_hashes(root: Path) -> dict[str, str]:
    """SHA-256 of each regular file below `root` by relative path."""
    base = os.fsencode(root)
    return {
        os.fsdecode(os.path.relpath(path, base)): _content_hash(path)
        for path in sorted(_paths(base))
        if stat.S_ISREG(os.lstat(path).st_mode)
    }


def _paths(base: bytes) -> Iterator[bytes]:
    for folder, folders, files in os.walk(base):
        for name in folders + files:
            yield os.path.join(folder, name)


def _facts(path: bytes, base: bytes, groups: dict[tuple[int, int], bytes], owners: bool) -> Facts:
    status = os.lstat(path)
    facts: Facts = {"mode": oct(status.st_mode), "mtime_ns": status.st_mtime_ns}
    if owners:
        facts["owner"] = (status.st_uid, status.st_gid)
    facts["xattrs"] = {
        name: os.getxattr(path, name, follow_symlinks=False)
        for name in sorted(os.listxattr(path, follow_symlinks=False))
    }
    if stat.S_ISLNK(status.st_mode):
        facts["target"] = os.readlink(path)
    elif stat.S_ISREG(status.st_mode):
        facts["content"] = (status.st_size, _content_hash(path))
        if status.st_nlink > 1:
            first = groups.setdefault((status.st_dev, status.st_ino), os.path.relpath(path, base))
            facts["linked_with"] = first
    elif stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode):
        facts["device"] = status.st_rdev
    return facts


def _content_hash(path: bytes) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while data := file.read(HASH_READ_BYTES):
            digest.update(data)
    return digest.hexdigest()
