"""The first moments of `dm`: Ctrl-C while it still imports."""

import signal
import subprocess
import sys

INTERRUPTED = 130
INTERRUPT_IN_THE_IMPORTS = """
import os, signal, sys
from dmsync.surfaces.cli.entry import main

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "click":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
sys.argv = ["dm", "version"]
sys.exit(main())
"""


def run_interrupted(before: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", before + INTERRUPT_IN_THE_IMPORTS],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_ctrl_c_during_the_imports_ends_quietly() -> None:
    ended = run_interrupted()
    assert (ended.returncode, ended.stdout, ended.stderr) == (INTERRUPTED, "", "")


def test_a_job_that_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    ignoring = f"import signal\nsignal.signal({int(signal.SIGINT)}, signal.SIG_IGN)\n"
    ended = run_interrupted(ignoring)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "Version" in ended.stdout
