"""The private host key of our own SSH server: read, or made when there is none."""

import os
import stat
from secrets import token_hex
from typing import Final

from dmsync.errors import ConfigError
from dmsync.storage.durable import (
    fsync_directory,
    make_directory_durable,
    remove_if_there,
    storage_errors,
    write_all,
)
from dmsync.transports.ssh_library import asyncssh

_KEY_BYTES_MAX: Final = 64 * 1024


def read_or_make_host_key(path: str) -> asyncssh.SSHKey:
    """The key in `path`; a new ed25519 key, durable and with mode 0600, where there is no file.

    Raises:
        ConfigError: no private key, one with a passphrase, or one that others may read.
        StorageFull, StorageFailed: it could not be written.
    """
    path = os.path.abspath(path)
    if not os.path.lexists(path):
        _make_host_key(path)
    try:
        with open(path, "rb") as file:
            _check_private(path, os.fstat(file.fileno()))
            content = file.read(_KEY_BYTES_MAX)
    except OSError as exc:
        raise ConfigError(f"cannot read the host key {path}: {exc.strerror}") from exc
    try:
        return asyncssh.import_private_key(content)
    except (asyncssh.KeyImportError, asyncssh.KeyEncryptionError) as exc:
        raise ConfigError(f"{path} is no private key without a passphrase: {exc}") from exc


def _check_private(path: str, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigError(f"{path} is not a regular file")
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o077:
        raise ConfigError(f"the host key {path} may be read by others", hint=f"chmod 600 {path}")


def _make_host_key(path: str) -> None:
    """Two servers that start at once end up with one key: the first link wins."""
    key = asyncssh.generate_private_key("ssh-ed25519", comment="dm serve")
    make_directory_durable(os.path.dirname(path))
    temporary = f"{path}.tmp-{token_hex(8)}"
    with storage_errors(f"writing the host key {path}"):
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            try:
                write_all(fd, key.export_private_key())
                os.fsync(fd)
            finally:
                os.close(fd)
            try:
                os.link(temporary, path)
            except FileExistsError:
                pass  # another server was first: its key is the key
        finally:
            remove_if_there(temporary)
    fsync_directory(os.path.dirname(path))
