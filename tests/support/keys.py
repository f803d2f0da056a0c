"""SSH keys for tests: made here, never taken from the machine."""

from dataclasses import dataclass
from pathlib import Path

import asyncssh


@dataclass(frozen=True, slots=True)
class KeyPair:
    """An ed25519 key: where its private half lies, and its public half as one OpenSSH line."""

    private: Path
    public: str


def make_key(path: Path, comment: str = "test") -> KeyPair:
    """Write a new private key to `path` (mode 0600) and its public half to `path`.pub."""
    key = asyncssh.generate_private_key("ssh-ed25519", comment=comment)
    path.touch(mode=0o600)
    key.write_private_key(str(path))
    public = key.export_public_key("openssh").decode().strip()
    path.with_name(path.name + ".pub").write_text(public + "\n")
    return KeyPair(path, public)


def known_hosts_line(port: int, public: str) -> str:
    """The line by which a client knows a host key on the loopback at `port`."""
    kind, text = public.split()[:2]
    return f"[127.0.0.1]:{port} {kind} {text}\n"
