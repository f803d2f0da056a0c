"""Lines of authorized_keys: what they allow, and that doubt denies."""

from pathlib import Path

import asyncssh
import pytest

from dmsync.engine.access import Role
from dmsync.transports.authorized_keys import AuthorizedKeys, BadKeyLine, parse_line

KEY = asyncssh.generate_private_key("ssh-ed25519", comment="me")
PUBLIC = KEY.export_public_key().decode().strip()


def test_plain_key_may_write_every_dot_as_anybody() -> None:
    entry = parse_line(PUBLIC)
    assert (entry.role, entry.dots, entry.user) == (Role.WRITE, None, None)
    assert entry.admits("anybody", "10.0.0.1")


def test_options_are_read() -> None:
    line = f'dm-role="append",DM-DOTS="a, b/*",dm-user="alice",from="10.0.0.0/8,!10.1.*",restrict {PUBLIC}'
    entry = parse_line(line)
    assert (entry.role, entry.dots, entry.user) == (Role.APPEND, ("a", "b/*"), "alice")
    assert entry.admits("alice", "10.0.0.1")
    assert not entry.admits("alice", "10.1.0.1")
    assert not entry.admits("alice", "11.0.0.1")
    assert not entry.admits("bob", "10.0.0.1")


@pytest.mark.parametrize(
    "options",
    [
        'dm-role="owner"',
        'dm-role=""',
        "dm-role",
        'dm-role="read',
        "dm-role=read",
        'dm-role="read",dm-role="admin"',
        'dm-role="read" ,restrict',
        'restrict="yes"',
        'dm-dots=""',
        'dm-dots="a,,b"',
        'dm-user="a/b"',
        'from=""',
        'from="10.0.0.0/99"',
        'from="*,!10.0.0.0/99"',
        'from="*,!evil.example"',
        'from="10.0.0.1,,"',
        'command="x"',
        'expiry-time="20300101"',
        'principals="x"',
        "no-such-option",
        ",",
        "restrict,",
        'environment="A=B"',
    ],
)
def test_what_is_not_understood_denies_the_key(options: str) -> None:
    with pytest.raises(BadKeyLine) as caught:
        parse_line(f"{options} {PUBLIC}")
    assert caught.value.key == KEY.convert_to_public()


@pytest.mark.parametrize(
    "line", ["nonsense", "ssh-ed25519", "ssh-ed25519 AAAA", "restrict", "x" * 40000]
)
def test_lines_without_a_key_let_nobody_in(line: str) -> None:
    with pytest.raises(BadKeyLine):
        parse_line(line)


def keys_of(path: Path, text: str, mode: int = 0o600) -> AuthorizedKeys:
    path.write_text(text)
    path.chmod(mode)
    keys = AuthorizedKeys(str(path))
    keys.refresh()
    return keys


def is_in(keys: AuthorizedKeys, user: str = "u") -> bool:
    found = keys.find(KEY.convert_to_public(), user, "127.0.0.1", is_authority=False)
    return found is not None


def test_a_bad_line_denies_the_key_of_a_good_one(tmp_path: Path) -> None:
    assert is_in(keys_of(tmp_path / "a", f"# comment\n\n{PUBLIC}\r\n"))
    assert not is_in(keys_of(tmp_path / "b", f'{PUBLIC}\ndm-role="x" {PUBLIC}\n'))


def test_the_first_line_that_fits_counts(tmp_path: Path) -> None:
    text = f'dm-user="a",dm-role="read" {PUBLIC}\ndm-user="b",dm-role="admin" {PUBLIC}\n'
    keys = keys_of(tmp_path / "keys", text)
    public = KEY.convert_to_public()
    found = [keys.find(public, user, "::1", is_authority=False) for user in ("a", "b", "c")]
    assert [entry and entry.role for entry in found] == [Role.READ, Role.ADMIN, None]


def test_an_authority_is_no_key(tmp_path: Path) -> None:
    keys = keys_of(tmp_path / "keys", f"cert-authority {PUBLIC}\n")
    assert not is_in(keys)
    assert keys.find(KEY.convert_to_public(), "u", "::1", is_authority=True) is not None


@pytest.mark.parametrize("mode", [0o620, 0o602, 0o666])
def test_a_file_that_others_may_write_lets_nobody_in(tmp_path: Path, mode: int) -> None:
    assert not is_in(keys_of(tmp_path / "keys", PUBLIC, mode))


def test_a_file_that_goes_lets_nobody_in(tmp_path: Path) -> None:
    keys = keys_of(tmp_path / "keys", PUBLIC)
    assert is_in(keys)
    (tmp_path / "keys").unlink()
    keys.refresh()
    assert not is_in(keys)
