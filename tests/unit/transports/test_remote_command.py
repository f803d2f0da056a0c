"""Command lines for the far shell and for ssh: nothing in a URL becomes syntax or an option."""

import shlex
import subprocess
import sys

import pytest

from dmsync.core.names import RemoteUrl
from dmsync.errors import AccessDenied, ConfigError, NotADmServer, UsageError
from dmsync.transports.remote_command import failure_of_silent_end, requested_home, serve_command
from dmsync.transports.ssh_command import ssh_arguments
from dmsync.transports.streams import DIAGNOSTICS_BYTES_MAX, Tail


@pytest.mark.parametrize("path", ["/store", "/a b", "/it's", "/$(id)", "/a;b", "/`id`", "-x", "/ü"])
def test_paths_are_quoted_and_read_back(path: str) -> None:
    command = serve_command(path, None)
    assert requested_home(command) == path
    assert shlex.split(command) == ["dm", "serve", "--stdio", "--home", path]


def test_dm_command_is_the_users_own_text() -> None:
    assert serve_command(None, "sudo -u db dm") == "sudo -u db dm serve --stdio"
    assert requested_home("/opt/dm/bin/dm serve --stdio") is None


@pytest.mark.parametrize("text", ["/a\nb", "/a\0b", "/a\x7f", "/" + "a" * 9000])
def test_control_characters_and_long_paths_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        serve_command(text, None)


@pytest.mark.parametrize(
    "command",
    [
        "",
        "dm",
        "sh -c 'dm serve --stdio'",
        "dm serve --stdio --home",
        "dm serve --stdio --home a b",
        "dm serve --stdio; id",
        "dm serve --listen :1",
        "dm serve --stdio '",
        "x" * 100_000,
    ],
)
def test_other_commands_are_refused(command: str) -> None:
    with pytest.raises(AccessDenied):
        requested_home(command)


def test_ssh_arguments_end_options_before_the_host() -> None:
    url = RemoteUrl("ssh", "host", "me", 2222, "/store")
    assert ssh_arguments(url, "ssh -i 'a key'", None) == [
        *("ssh", "-i", "a key", "-T", "-p", "2222", "-l", "me", "--", "host"),
        "dm serve --stdio --home /store",
    ]


@pytest.mark.parametrize(
    ("host", "user"),
    [("-oProxyCommand=id", None), ("h\nh", None), ("h h", None), ("h", "-x"), ("h", "a\0b")],
)
def test_hosts_and_users_that_are_options_are_refused(host: str, user: str | None) -> None:
    with pytest.raises(UsageError):
        ssh_arguments(RemoteUrl("ssh", host, user), "ssh", None)


@pytest.mark.parametrize("command", ["", "  ", "ssh 'x"])
def test_unusable_ssh_command_is_a_configuration_error(command: str) -> None:
    with pytest.raises(ConfigError):
        ssh_arguments(RemoteUrl("ssh", "h"), command, None)


def test_diagnostics_are_bounded_and_printable() -> None:
    tail = Tail()
    for _ in range(100):
        tail.feed(b"\x1b[31m\xff\xe2\x80\xae" + b"x" * 1000 + b"\r\n")
    tail.exit_status = 127
    shown = tail.describe()
    assert len(shown.encode()) <= DIAGNOSTICS_BYTES_MAX
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert shown.endswith("exit status 127")
    assert isinstance(failure_of_silent_end(tail, "h", through_ssh=False), NotADmServer)


def test_a_good_end_is_no_failure() -> None:
    tail = Tail()
    tail.exit_status = 0
    assert failure_of_silent_end(tail, "h", through_ssh=True) is None


def test_importing_the_ssh_library_starts_no_program() -> None:
    script = (
        "import sys\n"
        "sys.addaudithook(lambda e, a: e in ('subprocess.Popen', 'os.posix_spawn', 'os.fork',"
        " 'os.system') and sys.exit(f'{e} {a}'))\n"
        "import dmsync.transports.ssh_library, ctypes.util\n"
        "assert ctypes.util.find_library.__module__ == 'ctypes.util'\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_connecting_is_imported_without_asyncssh() -> None:
    script = "import sys, dmsync.transports.connecting\nassert 'asyncssh' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
