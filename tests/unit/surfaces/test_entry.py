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


ENDING = """
import atexit, sys, threading, time
from dmsync.surfaces.cli.entry import main

class Freed:
    def __del__(self):
        print("freed")

kept = Freed()
atexit.register(print, "handler")
def work():
    time.sleep(0.2)
    print("work")
if "--thread" in sys.argv:
    threading.Thread(target=work).start()
sys.argv = ["dm", "version"]
sys.exit(main())
"""


def run_ending(*arguments: str) -> list[str]:
    ended = subprocess.run(
        [sys.executable, "-c", ENDING, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return ended.stdout.splitlines()


def test_the_end_runs_what_was_asked_for_and_frees_nothing() -> None:
    """All output arrives, through a pipe too."""
    lines = run_ending()
    assert lines[0] == "Client:"
    assert lines[-1] == "handler"
    assert "freed" not in lines


def test_the_end_waits_for_a_thread() -> None:
    lines = run_ending("--thread")
    assert "work" in lines
    assert lines.index("work") < lines.index("handler") < lines.index("freed")


def test_the_end_keeps_the_exit_code() -> None:
    program = "import sys\nfrom dmsync.surfaces.cli.entry import main\nsys.exit(main())"
    ended = subprocess.run(
        [sys.executable, "-c", program, "--no-such-option"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 2
    assert "no-such-option" in ended.stderr
