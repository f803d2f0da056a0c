"""What a connection to a remote needs to know; built by a surface, which reads the environment."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

CONNECT_TIMEOUT_S: Final = 30.0
ACCEPTED_HOSTS_FILE: Final = "known_hosts"
SYSTEM_KNOWN_HOSTS: Final = "/etc/ssh/ssh_known_hosts"

AskAboutHost = Callable[[str, str], bool]
"""(host, fingerprint) -> whether the user trusts it; may take its time (the connection is shut)."""


@dataclass(frozen=True)
class SshSettings:
    """How to reach and trust a remote.

    `known_hosts_files` are read, missing ones skipped; `accepted_hosts_file` (DM_HOME/known_hosts)
    is read too, and is where a newly accepted host is written. `accept_host_key` is the one
    fingerprint (`SHA256:...`) of an unknown host to accept. `limit_bytes_per_s` is for
    each direction.
    """

    accepted_hosts_file: str
    known_hosts_files: tuple[str, ...] = ()
    key_file: str | None = None
    ssh_command: str | None = None
    dm_command: str | None = None
    accept_host_key: str | None = None
    connect_timeout_s: float = CONNECT_TIMEOUT_S
    limit_bytes_per_s: int | None = None
    on_unknown_host: AskAboutHost | None = None

    @property
    def all_known_hosts_files(self) -> tuple[str, ...]:
        """Every file that is looked up."""
        return (self.accepted_hosts_file, *self.known_hosts_files)


def known_hosts_files(given: str | None, user_home: str | None) -> tuple[str, ...]:
    """`given` (DM_KNOWN_HOSTS), the user's file and the system's."""
    files = [given] if given else []
    if user_home:
        files.append(os.path.join(user_home, ".ssh", "known_hosts"))
    return (*files, SYSTEM_KNOWN_HOSTS)
