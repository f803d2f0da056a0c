"""A few power cuts, crash states of a disk, and a control: the harness of the scorecard works."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from tools.faults import block_states, cut_controls, power_cuts
from tools.faults.apart import Crew

LOOP = "commit, tag, branch, reset"
CUTS, STATES = 5, 10

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/dev/loop-control") or not os.path.exists("/dev/fuse"),
    reason="filesystems are made, mounted and cut: root, loop devices and FUSE are needed",
)


@pytest.fixture(autouse=True)
def _tools_at_hand() -> None:
    path = os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"
    if shutil.which("mkfs.ext4", path=path) is None:
        pytest.skip("mkfs.ext4 of e2fsprogs is not installed")


def one_answer(work: Any, task: dict[str, Any], scratch: Path, fault: str = "") -> dict[str, Any]:
    name = f"{work.__module__}:{work.__name__}"
    environment = cut_controls.preload(fault) if fault else None
    crew = Crew(name, str(scratch), jobs=1, environment=environment)
    (answer,) = crew.do([task])
    assert "error" not in answer, answer["error"]
    return answer


def cuts(count: int, **more: Any) -> dict[str, Any]:
    seeds = [f"test:{number}" for number in range(count)]
    return {"kind": "ext4", "row": "", "subject": LOOP, "seeds": seeds, **more}


def test_nothing_acknowledged_is_lost_in_a_power_cut(tmp_path: Path) -> None:
    answer = one_answer(power_cuts.cut_some, cuts(CUTS), tmp_path)
    assert answer["problems"] == [] and answer["tried"] == CUTS


def test_nothing_acknowledged_is_lost_with_the_writes_of_a_disk(tmp_path: Path) -> None:
    task = {"kind": "ext4", "row": "", "subject": LOOP, "seed": "test", "states": STATES}
    answer = one_answer(block_states.try_some, task, tmp_path)
    assert answer["problems"] == [] and answer["tried"] == STATES
    assert answer["counts"]["acknowledged"] > 0


def test_an_early_acknowledgement_is_caught(tmp_path: Path) -> None:
    task = cuts(1, at_ack=3, fault=cut_controls.NO_LOG)
    assert one_answer(power_cuts.cut_some, task, tmp_path)["problems"]
