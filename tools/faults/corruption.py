"""Damaged files: each is found and named, harms no more than it must, and is healed.

Rows: `flips`, one bit anywhere in any file; `files`, each file deleted, emptied, cut short,
overwritten, swapped with another of its kind, or replaced by an older one.
"""

import itertools
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

from tools.faults.damage_steps import Steps, by_commands, in_one_fork
from tools.faults.damaged_scene import Scene, Survey, build, store_files
from tools.faults.forked import import_everything, run_dm
from tools.faults.row import Budget, Row

REAL_EVERY: Final = 25
"""Every so many tries the commands themselves are asked too, and work goes on afterwards."""
FLIPS_LONG: Final = 100_000
ZEROS_PASSED_OVER: Final = 64
MODES: Final = ("delete", "empty", "truncate", "garbage", "zeros", "swap", "older")


@dataclass(frozen=True)
class Damage:
    """One way to harm one file of a store. `keys`: of the records it hits, None for all."""

    file: str
    what: str
    apply: Callable[[str], None]
    keys: frozenset[bytes] | None = None


@dataclass
class Verdict:
    """What became of one try: broken promises, and what is worth counting."""

    losses: list[str] = field(default_factory=list)
    was_found: bool = False
    failed_answers: int = 0
    wrong_before_repair: int = 0


def run(budget: Budget) -> list[Row]:
    import_everything()
    scene = build(budget.directory, budget.seed)
    if budget.count is None:
        flips, files = FLIPS_LONG, len(store_files(scene.near)) * len(MODES)
    else:
        flips, files = budget.count * 2 // 3, budget.count - budget.count * 2 // 3
    return [
        _row(scene, budget, "flips", _flips(scene, budget.random("flips"), flips)),
        _row(scene, budget, "files", _file_damage(scene, budget, files)),
    ]


def _row(scene: Scene, budget: Budget, name: str, damages: Sequence[Damage]) -> Row:
    repeat = f"python -m tools.faults corruption --seed {budget.seed}"
    if budget.count is not None:
        repeat += f" --count {budget.count}"
    row = Row(f"corruption: {name}", "files harmed", budget.seed, repeat)
    found = failed = real = wrong = 0
    for number, damage in enumerate(damages):
        if budget.deadline_s is not None and time.monotonic() > budget.deadline_s:
            break
        is_real = number % REAL_EVERY == 0
        verdict = judge(scene, damage, is_real=is_real)
        row.tried += 1
        found += verdict.was_found
        failed += verdict.failed_answers
        wrong += bool(verdict.wrong_before_repair)
        real += is_real
        if verdict.losses:
            row.lost(f"{damage.file} {damage.what}: {'; '.join(verdict.losses)[:600]}")
    row.counts = {
        "found by fsck": found,
        "answers refused": failed,
        "projections that told wrong": wrong,
        "with commands": real,
    }
    return row


# --- damage ------------------------------------------------------------------------------------


def _flips(scene: Scene, chance: random.Random, count: int) -> list[Damage]:
    """Files of every kind in turn, places at random."""
    names = [n for n in store_files(scene.near) if os.path.getsize(os.path.join(scene.near, n))]
    kinds = sorted({kind_of(name) for name in names})
    chosen = []
    for kind in itertools.islice(itertools.cycle(kinds), count):
        name = chance.choice([name for name in names if kind_of(name) == kind])
        chosen.append(flip(scene, name, place_in(scene, name, chance), chance.randrange(8)))
    return chosen


def place_in(scene: Scene, name: str, chance: random.Random) -> int:
    """A byte of a file, mostly one that means something: small databases are mostly zeros."""
    with open(os.path.join(scene.near, name), "rb") as file:
        content = file.read()
    places = [chance.randrange(len(content)) for _ in range(ZEROS_PASSED_OVER)]
    return next((at for at in places if content[at]), places[0])


def kind_of(name: str) -> str:
    """Files that play one role: packs, catalogs, segments."""
    base = os.path.basename(name)
    place = "trash/" if name.startswith("trash/") else ""
    for ending in (".pack", ".stat", ".part", ".log"):
        if base.endswith(ending):
            return place + ending
    return place + (base if not name.startswith(("transfers/", "tmp/")) else name[:4])


def flip(scene: Scene, name: str, at: int, bit: int) -> Damage:
    """One bit of one file; its times stay, for bits rot silently."""

    def apply(home: str) -> None:
        path = os.path.join(home, name)
        times = os.stat(path)
        with open(path, "r+b") as file:
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ 1 << bit]))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    hit = [key for start, end, key in scene.records.get(name, ()) if start <= at < end]
    return Damage(name, f"bit {bit} of byte {at}", apply, frozenset(hit))


def _file_damage(scene: Scene, budget: Budget, count: int) -> list[Damage]:
    names = store_files(scene.near)
    pairs = [(name, mode) for name in names for mode in MODES]
    chance = budget.random("files")
    if not budget.is_long or count < len(pairs):
        chance.shuffle(pairs)
        by_kind: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for name, mode in pairs:
            by_kind.setdefault((kind_of(name), mode), []).append((name, mode))
        rounds = itertools.zip_longest(*by_kind.values())
        pairs = [pair for one in rounds for pair in one if pair is not None][:count]
    damages = (_damage(scene, name, mode, chance) for name, mode in pairs)
    return [damage for damage in damages if damage is not None]


def _damage(scene: Scene, name: str, mode: str, chance: random.Random) -> Damage | None:
    size = os.path.getsize(os.path.join(scene.near, name))
    others = [
        other
        for other in store_files(scene.near)
        if other != name and kind_of(other) == kind_of(name)
    ]
    at = chance.randrange(size) if size else 0
    noise = chance.randbytes(min(size, 4096) or 64)
    hit = [key for _, end, key in scene.records.get(name, ()) if end > at]
    keys: frozenset[bytes] | None = None
    if mode == "truncate":
        if not size:
            return None
        keys = frozenset(hit) if name in scene.records else None
    if mode == "swap" and not others:
        return None
    other = chance.choice(others) if mode == "swap" else ""
    if mode == "older" and not os.path.basename(name).endswith((".sqlite", ".log", ".stat")):
        return None

    def apply(home: str) -> None:
        path = os.path.join(home, name)
        match mode:
            case "delete":
                os.unlink(path)
            case "empty":
                os.truncate(path, 0)
            case "truncate":
                os.truncate(path, at)
            case "garbage":
                _overwrite(path, at, noise)
            case "zeros":
                _overwrite(path, at, bytes(len(noise)))
            case "swap":
                second = os.path.join(home, other)
                os.rename(path, path + ".swap")
                os.rename(second, path)
                os.rename(path + ".swap", second)
            case "older":
                shutil.copyfile(os.path.join(scene.older, name), path)

    if mode in ("garbage", "zeros") and name in scene.records:
        end_of_damage = at + len(noise)
        keys = frozenset(
            key for start, end, key in scene.records[name] if start < end_of_damage and end > at
        )
    if mode == "swap" and name in scene.records:
        both = [*scene.records[name], *scene.records.get(other, ())]
        keys = frozenset(key for _, _, key in both)
    if mode == "older" and not os.path.exists(os.path.join(scene.older, name)):
        return None
    what = f"{mode} {f'with {other}' if other else f'at {at}'}"
    return Damage(name, what, apply, keys)


def _overwrite(path: str, at: int, data: bytes) -> None:
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(data)


# --- judging -----------------------------------------------------------------------------------


def judge(scene: Scene, damage: Damage, *, is_real: bool) -> Verdict:
    """Harm a copy, look, repair, look again."""
    verdict = Verdict()
    home = scene.copy("harmed")
    damage.apply(home)
    if damage.file == "config.toml":  # the user's own words: nobody else can write them again
        return _judge_config(scene, home, verdict)
    if is_real:
        steps = by_commands(scene, home, lambda: _crashes_of_queries(scene, home))
    else:
        steps = in_one_fork(scene, home)
    verdict.was_found = steps.was_found
    if steps.crash:
        verdict.losses.append(steps.crash)
        return verdict
    _judge_answers(scene, damage, steps.before, verdict)
    _judge_fsck(scene, damage, steps, verdict)
    _judge_repair(scene, damage, steps, verdict)
    if is_real and not verdict.losses:
        _judge_going_on(scene, home, verdict)
    return verdict


def _judge_config(scene: Scene, home: str, verdict: Verdict) -> Verdict:
    ran = run_dm(["log"], scene.environment(home))
    if ran.is_crash or (ran.code and b"config.toml" not in ran.stderr):
        verdict.losses.append(f"config.toml is not named: {ran.told()}")
    verdict.was_found = bool(ran.code)
    return verdict


def _judge_answers(scene: Scene, damage: Damage, before: Survey, verdict: Verdict) -> None:
    allowed = None
    if damage.keys is not None:
        allowed = scene.dependants(set(damage.keys))
    for question, answer in before.items():
        if answer.startswith("!!"):
            verdict.losses.append(f"no typed error: {answer}")
        elif answer.startswith("!"):
            verdict.failed_answers += 1
            needed = scene.needs.get(question)
            if allowed is not None and needed is not None and not needed & allowed:
                verdict.losses.append(f"more harm than needed: {question}: {answer}")
        elif scene.truth.get(question) != answer:
            if damage.file.startswith("catalog.sqlite"):
                verdict.wrong_before_repair += 1
                if not _is_listing(question):
                    verdict.losses.append(f"wrong: {question}: {answer[:200]}")
            elif not damage.file.startswith("events/"):  # a log that lost its end says less
                verdict.losses.append(f"wrong: {question}: {answer[:200]}")


def _is_listing(question: str) -> bool:
    """Names and refs, which the catalog alone says; content is named by what it hashes to."""
    return len(question.split(" ")) < 3 or " log " in question or question == "remotes"


def _judge_fsck(scene: Scene, damage: Damage, steps: Steps, verdict: Verdict) -> None:
    if not steps.was_found:
        if steps.before != scene.truth and not damage.file.startswith("catalog.sqlite"):
            verdict.losses.append("fsck found nothing, and answers differ")
        return
    base = os.path.basename(damage.file)
    named = [base, base.partition("-")[0], "event", "was lost"]
    named += [key.hex()[:12] for _, _, key in scene.records.get(damage.file, ())]
    if not any(name in steps.told for name in named):
        verdict.losses.append(f"fsck does not name {base}: {steps.told[:300]}")


def _judge_repair(scene: Scene, damage: Damage, steps: Steps, verdict: Verdict) -> None:
    """All is as it was; but what only the trash had is nowhere else."""
    in_trash = damage.file.startswith("trash/")
    left = [p for p in steps.left if not (in_trash and p["dot"].startswith("trash/"))]
    if left:
        verdict.losses.append(f"left by repair: {left}"[:400])
        return
    for question in sorted({*steps.after, *scene.truth}):
        if steps.after.get(question) != scene.truth.get(question):
            told = str(steps.after.get(question))[:200]
            verdict.losses.append(f"after repair {question}: {told}")
            return


QUERIES: Final = (
    ("log", "--json"),
    ("log", "--graph", "topic"),
    ("ls", "HEAD:__default__"),
    ("cat", "HEAD:__default__/d/text"),
    ("diff", "HEAD~1", "HEAD", "--stat"),
    ("branch",),
    ("tag",),
    ("list",),
    ("status",),
    ("op", "log"),
)


def _crashes_of_queries(scene: Scene, home: str) -> list[str]:
    out = os.path.join(scene.directory, "out")
    shutil.rmtree(out, ignore_errors=True)
    crashes = []
    for query in (*QUERIES, ("export", "HEAD", out)):
        ran = run_dm(query, scene.environment(home))
        if ran.is_crash or ran.code is None:
            crashes.append(f"dm {' '.join(query)}: {ran.told()}")
    return crashes


def _judge_going_on(scene: Scene, home: str, verdict: Verdict) -> None:
    """The next commit and push are as ever."""
    environment = scene.environment(home)
    path = run_dm(["dot", "path", "shop"], environment).stdout.decode().strip()
    far = os.path.join(scene.directory, "far-after")
    shutil.rmtree(far, ignore_errors=True)
    with open(os.path.join(path, "after"), "w") as file:
        file.write("work goes on")
    run_dm(["init", "--bare"], {**environment, "DM_HOME": far})
    for words in (
        ["commit", "-m", "after the repair"],
        ["push", far, "--all"],
        ["fsck", "--full"],
    ):
        ran = run_dm(words, environment)
        if ran.code != 0:
            verdict.losses.append(f"then dm {' '.join(words)}: {ran.told()}")
            return
