"""Compare this project with its peers on the same data in the same run; medians, ratios, JSON."""

import argparse
import json
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Final

from tests.support.postgresql import PostgresServer
from tools.bench.peers import Borg, Cost, Dm, Git, Restic, Rsync, Sender, Store
from tools.bench.references import tar_zstd_bytes, xor_reference

RESULTS: Final = Path(__file__).with_name("results")
ROUNDS: Final = 3
USR_SHARE: Final = Path("/usr/share")


@dataclass
class Samples:
    """All costs of one program at one step of one workload."""

    workload: str
    step: str
    program: str
    costs: list[Cost] = field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median wall time."""
        return statistics.median(cost.seconds for cost in self.costs)

    @property
    def size(self) -> float:
        """Median of bytes stored or sent."""
        return statistics.median(cost.size for cost in self.costs)


class Table:
    """Samples by workload, step and program, in the order they first came."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str, str], Samples] = {}

    def add(self, workload: str, step: str, program: str, cost: Cost) -> None:
        """Keep one measurement."""
        key = (workload, step, program)
        self.rows.setdefault(key, Samples(*key)).costs.append(cost)
        print(
            f"  {workload}, {step}, {program}: {cost.seconds:.2f} s, {cost.size / 1e6:.2f} MB",
            flush=True,
        )

    def markdown(self) -> str:
        """One line a step and program; the ratios are against dm at the same step."""
        lines = [
            "| workload | step | program | seconds | x dm | MB | x dm |",
            "| --- | --- | --- | ---: | ---: | ---: | ---: |",
        ]
        for (workload, step, _), samples in self.rows.items():
            dm = self.rows.get((workload, step, Dm.name), samples)
            lines.append(
                f"| {workload} | {step} | {samples.program} | {samples.seconds:.2f} | "
                f"{_ratio(samples.seconds, dm.seconds)} | {samples.size / 1e6:.2f} | "
                f"{_ratio(samples.size, dm.size)} |"
            )
        return "\n".join(lines)


def _ratio(value: float, against: float | None) -> str:
    return f"{value / against:.2f}" if against else "-"


# --- data --------------------------------------------------------------------------------------


def pgbench_versions(directory: Path, scale: int) -> list[Path]:
    """Copies of a stopped PostgreSQL directory: initialised, then after each round of pgbench."""
    versions = []
    with PostgresServer(directory / "data") as server:
        server.initdb()
        server.start()
        server.pgbench("-i", "-q", "-s", str(scale))
        server.stop()
        for number in range(ROUNDS + 1):
            if number > 0:
                server.start()
                server.pgbench("-n", "-c", "4", "-t", "1000")
                server.stop()
            versions.append(directory / f"v{number}")
            subprocess.run(["cp", "-a", server.data, versions[-1]], check=True)
    return versions


def make_current(version: Path, work: Path) -> None:
    """Turn `work` into `version`, writing changed files in place as the database had done."""
    command = ["rsync", "-a", "--inplace", "--delete", f"{version}/", f"{work}/"]
    subprocess.run(command, check=True)


# --- workloads ---------------------------------------------------------------------------------


@contextmanager
def programs(directory: Path) -> Iterator[tuple[list[Store], list[Sender]]]:
    """All programs with empty stores; senders in the order they have to work."""
    directory.mkdir()
    dm = Dm(directory)
    rsync = Rsync(directory, dm.near)
    try:
        yield [dm, Restic(directory), Borg(directory), Git(directory)], [dm, rsync]
    finally:
        rsync.close()
        dm.close()


def measure_postgresql(table: Table, scratch: Path, versions: Sequence[Path], number: int) -> None:
    """First commit and push of a database directory, then each round."""
    work = scratch / "work"
    with programs(scratch / f"pg{number}") as (stores, senders):
        for round_number, version in enumerate(versions):
            make_current(version, work)
            step = "first commit" if round_number == 0 else f"commit of round {round_number}"
            commit_all(table, "postgresql", step, stores, work, number)
            for sender in senders:
                table.add(
                    "postgresql", step.replace("commit", "push"), sender.name, sender.send(work)
                )


def measure_usr_share(table: Table, scratch: Path, number: int) -> None:
    """First commit of many small files, then one with nothing changed."""
    with programs(scratch / f"share{number}") as (stores, _):
        for step in ("first commit", "commit without change"):
            commit_all(table, "/usr/share", step, stores, USR_SHARE, number)


def commit_all(
    table: Table, workload: str, step: str, stores: Sequence[Store], source: Path, number: int
) -> None:
    """Every store commits; each run begins with another one, so that nobody always comes first."""
    start = number % len(stores)
    for store in (*stores[start:], *stores[:start]):
        table.add(workload, step, store.name, store.commit(source))


def add_references(table: Table, versions: Sequence[Path]) -> None:
    """Figures that need no program: tar | zstd -3 and the xor reference of each round."""
    measures: dict[str, Callable[[], int]] = {"first commit": partial(tar_zstd_bytes, versions[0])}
    for number, (old, new) in enumerate(pairwise(versions), start=1):
        measures[f"commit of round {number}"] = partial(xor_bytes, old, new)
    for step, measure in measures.items():
        started = time.perf_counter()
        size = measure()
        table.add("postgresql", step, "reference", Cost(time.perf_counter() - started, size))


def xor_bytes(old: Path, new: Path) -> int:
    """Size of the xor reference of two versions."""
    return xor_reference(old, new).compressed_bytes


# --- results -----------------------------------------------------------------------------------


def versions_of_programs(scratch: Path) -> list[str]:
    """What each program calls itself."""
    with programs(scratch / "versions") as (stores, senders):
        rsync = senders[-1]
        assert isinstance(rsync, Rsync)
        return [*(store.version() for store in stores), rsync.version()]


def store_results(table: Table, versions: Sequence[str], runs: int) -> Path:
    """Write everything measured as JSON, named after the day."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{time.strftime('%Y-%m-%d-%H%M%S')}.json"
    document = {
        "machine": f"{platform.platform()}, {platform.processor() or platform.machine()}",
        "python": platform.python_version(),
        "programs": list(versions),
        "runs": runs,
        "samples": [asdict(samples) for samples in table.rows.values()],
    }
    path.write_text(json.dumps(document, indent=1) + "\n")
    return path


def main() -> None:
    """Measure what was asked for and report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3, help="repetitions; medians are reported")
    parser.add_argument("--scale", type=int, default=40, help="pgbench scale factor")
    parser.add_argument(
        "--workload",
        action="append",
        choices=("postgresql", "usr-share"),
        help="only this one (may be given twice)",
    )
    arguments = parser.parse_args()
    workloads = arguments.workload or ["postgresql", "usr-share"]
    table = Table()
    with tempfile.TemporaryDirectory(prefix="dm-bench-") as directory:
        scratch = Path(directory)
        versions = versions_of_programs(scratch)
        print("; ".join(versions))
        if "postgresql" in workloads:
            data = pgbench_versions(scratch, arguments.scale)
            for number in range(arguments.runs):
                measure_postgresql(table, scratch, data, number)
            add_references(table, data)
        if "usr-share" in workloads:
            for number in range(arguments.runs):
                measure_usr_share(table, scratch, number)
    path = store_results(table, versions, arguments.runs)
    print(f"\n{'; '.join(versions)}; medians of {arguments.runs}\n\n{table.markdown()}\n\n{path}")


if __name__ == "__main__":
    main()
