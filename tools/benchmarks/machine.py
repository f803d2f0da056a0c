"""What figures were measured on and with: machine, filesystem, versions of all programs."""

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Final

PROGRAMS: Final = {
    "restic": ("restic", "version"),
    "borg": ("borg", "--version"),
    "git": ("git", "--version"),
    "bup": ("bup", "--version"),
    "rsync": ("rsync", "--version"),
    "ssh": ("ssh", "-V"),
    "tar": ("tar", "--version"),
    "zstd": ("zstd", "--version"),
    "python3": ("python3", "--version"),
}
LIBRARIES: Final = ("asyncssh", "backports.zstd", "zstandard", "blake3", "msgpack", "pyfastcdc")


def describe_machine(directory: Path) -> dict[str, str | int]:
    """CPU, cores, memory, kernel and the filesystem that `directory` is on."""
    memory_kib = _found(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())
    return {
        "cpu": _found(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()),
        "cores": len(os.sched_getaffinity(0)),
        "memory_mib": int(memory_kib or 0) // 1024,
        "kernel": platform.release(),
        "system": _found(r'PRETTY_NAME="(.+)"', Path("/etc/os-release").read_text()),
        "filesystem": _filesystem(directory),
        "python": platform.python_version(),
    }


def describe_programs() -> dict[str, str]:
    """Versions of this project, its libraries and all peers; the commit measured."""
    found = {name: _version(command) for name, command in PROGRAMS.items()}
    found |= {name: metadata.version(name) for name in LIBRARIES}
    return {"dm": f"{metadata.version('dmsync')} ({_git_commit()})", **found}


def _version(command: tuple[str, ...]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except FileNotFoundError:
        return ""
    return _found(r"[vV_]?(\d+\.\d+[\w.+~-]*)", done.stdout + done.stderr)


def _git_commit() -> str:
    """The commit of the source, `+` after it when it was changed since."""
    source = Path(__file__).parent
    describe = ["git", "-C", str(source), "describe", "--always", "--dirty=+", "--abbrev=10"]
    done = subprocess.run(describe, capture_output=True, text=True)
    return done.stdout.strip() or "no commit"


def _filesystem(directory: Path) -> str:
    done = subprocess.run(["df", "--output=fstype", str(directory)], capture_output=True, text=True)
    return done.stdout.split()[-1] if done.stdout else ""


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    return match[1].strip() if match else ""
