"""A host that two processes meet for the first time at once."""

import asyncio
from pathlib import Path

import asyncssh
import pytest

from dmsync.core.names import parse_remote_url
from dmsync.errors import HostKeyRejected
from dmsync.transports.host_keys import known_hosts_line, remember_host
from dmsync.transports.ssh_client import _settle_untrusted
from dmsync.transports.ssh_settings import SshSettings

URL = parse_remote_url("ssh://user@host.example:7333")


def make_key() -> asyncssh.SSHKey:
    return asyncssh.generate_private_key("ssh-ed25519").convert_to_public()


def test_a_key_that_another_process_has_just_remembered_is_known(tmp_path: Path) -> None:
    key, settings = make_key(), SshSettings(str(tmp_path / "known_hosts"))
    remember_host(settings.accepted_hosts_file, URL.host, URL.port, key)
    asyncio.run(_settle_untrusted(URL, settings, key))
    assert (tmp_path / "known_hosts").read_text().count("ssh-ed25519") == 1


def test_another_key_than_the_one_remembered_meanwhile_is_a_change(tmp_path: Path) -> None:
    settings = SshSettings(str(tmp_path / "known_hosts"))
    remember_host(settings.accepted_hosts_file, URL.host, URL.port, make_key())
    with pytest.raises(HostKeyRejected, match="CHANGED"):
        asyncio.run(_settle_untrusted(URL, settings, make_key()))


def test_a_key_that_is_known_and_revoked_is_refused(tmp_path: Path) -> None:
    key, settings = make_key(), SshSettings(str(tmp_path / "known_hosts"))
    line = known_hosts_line(URL.host, URL.port, key)
    (tmp_path / "known_hosts").write_text(f"{line}\n@revoked {line}\n")
    with pytest.raises(HostKeyRejected, match="revoked"):
        asyncio.run(_settle_untrusted(URL, settings, key))
