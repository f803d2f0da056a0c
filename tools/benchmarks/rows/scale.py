"""Very large things with a small change: 100 GB in one file, a million names in one directory."""

import os
import sys
from pathlib import Path

from tools.benchmarks import synthetic
from tools.benchmarks.data_sets import make_files
from tools.benchmarks.peers import Dm
from tools.benchmarks.result import RowResult
from tools.benchmarks.rows.no_change import check_memory
from tools.benchmarks.workspace import Workspace

FIRST, CHANGED = "first commit", "one change"
STORED_BYTES_MAX = 100e3
MEMORY_BYTES_MAX = 200e6
SYNTHETIC_SCRIPT = Path(synthetic.__file__)


def huge_file(work: Workspace, row: RowResult) -> None:
    """A file of 100 GB, all chunks unique and none of zeros, then one page of it changed."""
    size_bytes = work.sizes.synthetic_bytes
    with work.directory("huge") as directory:
        source = directory / "data"
        source.mkdir()
        file = source / "huge"
        file.touch()
        os.truncate(file, size_bytes)
        dm = Dm(directory)
        dm.attach(source)
        pages = size_bytes // synthetic.PAGE_BYTES
        for step, changed_page in ((FIRST, -1), (CHANGED, pages // 2)):
            dm.cluster.program = (
                *(sys.executable, "-P", str(SYNTHETIC_SCRIPT)),
                *(str(file), str(changed_page)),
            )
            os.utime(file)
            row.add(step, "dm", dm.commit(source))
    row.notes.append(
        f"{size_bytes / 1e9:.1f} GB made while they are read (tools/benchmarks/synthetic.py)"
    )
    _check(row)


def huge_directory(work: Workspace, row: RowResult) -> None:
    """A million names in one directory, then one of the files changed."""
    with work.directory("wide") as directory:
        source = directory / "data"
        make_files(source, work.sizes.directory_entries, flat=True)
        dm = Dm(directory)
        row.add(FIRST, "dm", dm.commit(source))
        (source / f"{work.sizes.directory_entries // 2:07}").write_text("changed\n")
        row.add(CHANGED, "dm", dm.commit(source))
    row.notes.append(f"{work.sizes.directory_entries} empty files in one directory")
    _check(row)


def _check(row: RowResult) -> None:
    row.runs = 1
    grown = row.median(CHANGED, "dm", "stored_bytes")
    row.check(f"{CHANGED}: growth", grown, "bytes", STORED_BYTES_MAX)
    check_memory(row, CHANGED, MEMORY_BYTES_MAX)
    check_memory(row, FIRST, MEMORY_BYTES_MAX)
