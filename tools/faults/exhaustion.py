"""Resources that run out under a command: space, inodes, descriptors, memory, file size.

Each try gives one command of a scene a little less than it may need. It must do its work or refuse
by a typed error, say nothing untrue, and leave what the next command works with once there is
enough again.
"""

import os
import resource
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Final

from tools.faults import forked
from tools.faults.apart import have_own_mounts, mount, unmount
from tools.faults.row import Budget, Row
from tools.faults.scenes import SCENES, Scene, forked_once

MIB: Final = 1024 * 1024
_ENOUGH: Final = "size=256m,nr_inodes=100000"
PATIENCE_S: Final = 100.0
"""Beyond the time after which a peer that says nothing is given up."""
_MS_REMOUNT: Final = 0x20

Limit = Callable[[], None]


@dataclass(frozen=True)
class Resource:
    """`draw` gives how much a try gets, in `unit`. One of a disk limits the disk that both stores
    lie on, one of a process the process that is the scene's victim."""

    unit: str
    draw: Callable[[Random], int]
    process: Callable[[int], None] | None = None
    disk: Callable[[str, int], None] | None = None


def run(budget: Budget) -> list[Row]:
    """One row for each resource, with the tries divided among them."""
    forked_once()
    have_own_mounts()
    templates = _prepare(budget)
    total = budget.count or len(RESOURCES) * len(templates)
    return [
        _try_resource(budget, name, templates, max(1, total // len(RESOURCES)))
        for name in RESOURCES
    ]


def _prepare(budget: Budget) -> dict[str, str]:
    templates = {}
    for name, scene in SCENES.items():
        if scene.is_available:
            templates[name] = os.path.join(budget.directory, f"template-{name}")
            scene.prepare(templates[name])
    return templates


def _try_resource(budget: Budget, name: str, templates: dict[str, str], count: int) -> Row:
    began = time.monotonic()
    repeat = f"python -m tools.faults exhaustion --seed {budget.seed} --count {budget.count}"
    row = Row(f"exhaustion: {name}", "commands", budget.seed, repeat)
    ends: Counter[str] = Counter()
    for number in range(count):
        if budget.deadline_s is not None and time.monotonic() > budget.deadline_s:
            break
        random = budget.random(name, number)
        scene = SCENES[random.choice(sorted(templates))]
        amount = RESOURCES[name].draw(random)
        what = f"{scene.name} with {amount:,} {RESOURCES[name].unit} (try {number})"
        disk = os.path.join(budget.directory, "disk")
        with _disk(disk):
            problems, end = _try(disk, templates[scene.name], scene, RESOURCES[name], amount)
        row.tried += 1
        ends[end] += 1
        if problems:
            row.lost(f"{what}: {end}: {'; '.join(problems)}")
    row.counts.update(sorted(ends.items()))
    row.elapsed_s = time.monotonic() - began
    return row


def _try(
    disk: str, template: str, scene: Scene, scarce: Resource, amount: int
) -> tuple[list[str], str]:
    """(problems, how the command ended)."""
    directory = os.path.join(disk, "try")
    scene.copy(template, directory)
    if scarce.disk is not None:
        scarce.disk(disk, amount)
    ran = _run(scene, directory, scarce, amount)
    _plenty(disk)
    problems = []
    if ran.code is None:
        problems.append("it did not end")
    if ran.is_crash:
        problems.append(f"no typed error: {ran.told()}")
    acknowledged = scene.acknowledged(ran.code, ran.stdout)
    problems += scene.verify(directory, acknowledged)
    return problems, "done" if acknowledged else f"exit {ran.code}"


def _run(scene: Scene, directory: str, scarce: Resource, amount: int) -> forked.Ran:
    limit: Limit | None = None if scarce.process is None else partial(scarce.process, amount)
    is_server = scene.victim == "far"
    environment = scene.environment(directory)
    return forked.run_dm(
        scene.arguments(),
        environment,
        hook=None if is_server else limit,
        server_hook=limit if is_server else None,
        patience_s=PATIENCE_S,
    )


# --- resources -----------------------------------------------------------------------------------


def _few_descriptors(count: int) -> None:
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, count))


def _little_memory(more_bytes: int) -> None:
    """So much more than the process has at its beginning."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + more_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _short_files(most_bytes: int) -> None:
    """A write beyond it is cut short, the next one fails: what a quota may do as well."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))


def _little_space(disk: str, free_bytes: int) -> None:
    with open(os.path.join(disk, "fill"), "wb") as file:
        found = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_frsize - free_bytes)


def _few_inodes(disk: str, free: int) -> None:
    found = os.statvfs(disk)
    inodes = found.f_files - found.f_ffree + free
    mount("tmpfs", disk, "tmpfs", _MS_REMOUNT, f"nr_inodes={inodes}")


def _plenty(disk: str) -> None:
    try:
        os.unlink(os.path.join(disk, "fill"))
    except FileNotFoundError:
        pass
    mount("tmpfs", disk, "tmpfs", _MS_REMOUNT, _ENOUGH)


def _pages(most: int) -> Callable[[Random], int]:
    """Bytes in pages, little more often than much."""
    return lambda random: 4096 * int(most * random.random() ** 2 / 4096)


RESOURCES: Final = {
    "space": Resource("bytes of disk", _pages(2 * MIB), disk=_little_space),
    "inodes": Resource("inodes", lambda random: random.randrange(40), disk=_few_inodes),
    "descriptors": Resource(
        "descriptors", lambda random: random.randrange(4, 48), process=_few_descriptors
    ),
    "memory": Resource("bytes of memory", _pages(96 * MIB), process=_little_memory),
    "file size": Resource("bytes a file", _pages(MIB), process=_short_files),
}


# --- disks ---------------------------------------------------------------------------------------


@contextmanager
def _disk(path: str) -> Iterator[None]:
    os.makedirs(path, exist_ok=True)
    mount("tmpfs", path, "tmpfs", data=f"{_ENOUGH},mode=700")
    try:
        yield
    finally:
        unmount(path, lazily=True)
