"""The README's tour is what really happens: its commands are run and their output compared."""

import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"
PORT = "7022"
_END = "--- end of one command ---"


def tour() -> list[tuple[str, list[str]]]:
    """(command, lines of output) of every console block, in order."""
    steps: list[tuple[str, list[str]]] = []
    for block in re.findall(r"```console\n(.*?)```", README.read_text(), re.DOTALL):
        for line in block.splitlines():
            if line.startswith("$ "):
                steps.append((line[2:], []))
            else:
                steps[-1][1].append(line)
    return steps


def normalised(lines: list[str], port: str) -> list[str]:
    """Without what differs from run to run: ids, dates, key fingerprints, sizes, the port."""
    text = "\n".join(lines).replace(port, PORT).strip()
    text = re.sub(r"\b[0-9a-f]{64}\b", "ID", text)
    text = re.sub(r"\b[0-9a-f]{12}\b", "ID", text)
    text = re.sub(
        r"\b\w{3} \w{3} +\d+ [\d:]{8} \d{4} [+-]\d{4}|Date: .*|\b20\d\d-\d\d-\d\d \d\d:\d\d\b",
        "DATE",
        text,
    )
    text = re.sub(r"\b20\d{6}T\d{6}Z(-\d)?\b|\b20\d\d-\d\d-\d\dT[0-9:.+-]+", "TIME", text)
    text = re.sub(r"\w+@\w+", "USER@HOST", text)
    text = re.sub(r"SHA256:\S+", "SHA256:KEY", text)
    text = re.sub(r"[0-9.]+ kiB", "SIZE", text)
    return text.splitlines()


class Shell:
    """One bash, fed a command at a time, as a reader of the README would."""

    def __init__(self, directory: Path) -> None:
        bin_directory = Path(sys.executable).parent
        self.process = subprocess.Popen(
            ["bash", "--noprofile", "--norc"],
            cwd=directory,
            env={"PATH": f"{bin_directory}:/usr/sbin:/usr/bin:/bin", "HOME": str(directory)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, command: str) -> list[str]:
        """Output of a command; of one in the background, its first line."""
        assert self.process.stdin and self.process.stdout
        background = command.endswith("&")
        print(command if background else f"{command}\necho '{_END}'", file=self.process.stdin)
        self.process.stdin.flush()
        lines = []
        for line in self.process.stdout:
            if line.rstrip("\n") == _END:
                return lines
            lines.append(line.rstrip("\n"))
            if background:
                return lines
        raise AssertionError(f"the shell ended in: {command}\n" + "\n".join(lines))

    def close(self) -> None:
        assert self.process.stdin
        print("kill $(jobs -p); exit", file=self.process.stdin)
        self.process.communicate(timeout=30)


def test_tour_prints_what_the_readme_says(tmp_path: Path) -> None:
    steps = tour()
    assert len(steps) > 20
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shell = Shell(tmp_path)
    try:
        for command, expected in steps:
            printed = shell.run(command.replace(PORT, port))
            assert normalised(printed, port) == normalised(expected, port), command
    finally:
        shell.close()


@pytest.mark.parametrize("name", ["tools/demo", "tools/test", "tools/check", "protocol/README.md"])
def test_what_the_readme_names_exists(name: str) -> None:
    assert name in README.read_text()
    assert (README.parent / name).exists()
