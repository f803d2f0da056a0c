"""Damaged files, tried on the whole program: found, named, contained, healed from a remote.

More of each kind: `python -m tools.faults corruption`.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tools.faults.corruption import Damage, flip, judge
from tools.faults.damage_steps import summary
from tools.faults.damaged_scene import Scene, build, store_files
from tools.faults.forked import run_dm


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return build(str(tmp_path_factory.mktemp("scene")), 7)


def files_ending(scene: Scene, ending: str) -> list[str]:
    """Largest first; nothing of the trash."""
    found = [name for name in store_files(scene.near) if name.endswith(ending)]
    found = [name for name in found if not name.startswith("trash/")]
    return sorted(found, key=lambda name: -os.path.getsize(os.path.join(scene.near, name)))


def deleting(name: str) -> Damage:
    return Damage(name, "deleted", lambda home: os.unlink(os.path.join(home, name)))


@pytest.mark.parametrize("ending", [".pack", ".log", "catalog.sqlite", "index.sqlite", "format"])
def test_a_lost_file_is_named_and_everything_comes_back(scene: Scene, ending: str) -> None:
    verdict = judge(scene, deleting(files_ending(scene, ending)[0]), is_real=True)
    assert verdict.losses == []
    assert verdict.was_found == (ending in (".pack", ".log", "format"))


@pytest.mark.parametrize("ending", [".pack", ".log", "catalog.sqlite", "index.sqlite", "format"])
def test_a_flipped_bit_harms_no_more_than_it_must(scene: Scene, ending: str) -> None:
    name = files_ending(scene, ending)[0]
    size = os.path.getsize(os.path.join(scene.near, name))
    for number in range(3):
        verdict = judge(scene, flip(scene, name, size * (2 * number + 1) // 6, 2), is_real=False)
        assert verdict.losses == []


def test_the_judge_sees_harm_that_nobody_tells(scene: Scene) -> None:
    """With an answer that was never right every try must end in a loss."""
    question = next(name for name in scene.truth if name.endswith("/big"))
    right = scene.truth[question]
    scene.truth[question] = "0" * 32
    try:
        verdict = judge(scene, deleting(files_ending(scene, ".stat")[0]), is_real=False)
    finally:
        scene.truth[question] = right
    assert any("wrong" in loss for loss in verdict.losses)


def test_only_what_is_harmed_crosses_the_wire(scene: Scene) -> None:
    """A pack of 400 KB of many is lost: its records come, and not the others'."""
    home = scene.copy("harmed")
    name = files_ending(scene, ".pack")[0]
    os.unlink(os.path.join(home, name))
    shutil.rmtree(os.path.join(home, os.path.dirname(os.path.dirname(name)), "trees"))
    ran = run_dm(["fsck", "--repair", "--from", "far", "--json"], scene.environment(home))
    assert ran.code == 0, ran.told()
    told = summary(ran)
    assert told["problems"] == [] and told["objects_healed"] > 0
    everything = sum(len(records) for records in scene.records.values())
    assert 0 < told["records_fetched"] < everything


def test_what_no_source_has_is_named_with_commits_and_paths(scene: Scene) -> None:
    home = scene.copy("harmed")
    name = files_ending(scene, ".pack")[0]
    os.unlink(os.path.join(home, name))
    shutil.rmtree(os.path.join(home, os.path.dirname(os.path.dirname(name)), "trees"))
    ran = run_dm(["fsck", "--repair", "--json"], scene.environment(home))
    assert ran.code == 16, ran.told()
    problems = summary(ran)["problems"]
    assert any(os.path.basename(name) in problem["where"] for problem in problems)
    named = [problem for problem in problems if "__default__/big" in problem["paths"]]
    assert named and all(problem["commits"] for problem in named)


def test_a_remote_that_is_harmed_itself_gives_what_it_can(scene: Scene) -> None:
    """Both lost a pack; only the other's is to be had."""
    home = scene.copy("harmed")
    far = os.path.join(scene.directory, "harmed-far")
    shutil.rmtree(far, ignore_errors=True)
    shutil.copytree(scene.far, far, symlinks=True)
    first, second = files_ending(scene, ".pack")[:2]
    for where, name in ((home, first), (far, second)):
        os.unlink(os.path.join(where, name))
        shutil.rmtree(os.path.join(where, os.path.dirname(os.path.dirname(name)), "trees"))
    ran = run_dm(["fsck", "--repair", "--from", far, "--json"], scene.environment(home))
    assert ran.code in (0, 16) and not ran.is_crash, ran.told()
    healed = summary(ran)
    lost = {key.hex() for _, _, key in scene.records[first]}
    left = {problem["where"][:16] for problem in healed["problems"]}
    assert len(left & lost) < len(lost)


READ_FAILS = "read of a harmed sector"


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_a_sector_that_cannot_be_read_is_named_and_the_rest_is_read(scene: Scene) -> None:
    """EIO on one pack: no traceback, the pack's name, and other commits as ever."""
    home = scene.copy("harmed")
    dot = next(n for n in files_ending(scene, ".pack")).split("/packs/")[0]
    (pack,) = [name for name in files_ending(scene, ".pack") if name.startswith(dot)][:1]
    command = ["strace", "-f", "-qq", "-o", "/dev/null", "-P", os.path.join(home, pack)]
    command += ["-e", "trace=pread64", "-e", "inject=pread64:error=EIO"]
    dm = [sys.executable, "-m", "dmsync"]
    checkout = Path(__file__).parents[2]
    environment = {**scene.environment(home), "PYTHONPATH": str(checkout)}

    def run(*words: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [*command, *dm, *words], env=environment, capture_output=True, text=True, check=False
        )

    read = run("cat", "HEAD~2:__default__/big", "--json")
    assert read.returncode == 16 and "Traceback" not in read.stderr
    error = json.loads(read.stderr.splitlines()[-1])
    assert os.path.basename(pack) in error["message"], error
    checked = run("fsck", "--full", "--json")
    assert checked.returncode == 16, checked.stderr
    assert os.path.basename(pack) in checked.stdout
    assert run("cat", "other1:__default__/file").returncode in (0, 10)
    assert run("log", "--json").returncode == 0
