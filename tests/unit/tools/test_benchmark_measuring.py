"""How tools/bench measures one command, and the file whose content is made while it is read."""

import os
import sys
from pathlib import Path

import pytest

from tools.benchmarks.measuring import measured
from tools.benchmarks.synthetic import PAGE_BYTES, SyntheticFile

CHUNK_BYTES = 16 * PAGE_BYTES
SIZE_BYTES = 4 * CHUNK_BYTES


def test_a_command_s_cost_counts_its_children_and_what_they_wrote(tmp_path: Path) -> None:
    script = 'head -c 3000000 /dev/zero > "$0"; echo done'
    cost, output = measured(["sh", "-c", script, str(tmp_path / "written")])
    assert output == "done\n"
    assert cost.wall_s > 0
    assert cost.written_bytes in (0, *range(3_000_000, 6_000_000)), "memory filesystems count none"
    assert 3_000_000 <= cost.handed_bytes < 3_100_000, "the child's writes, once"
    assert 0 < cost.peak_rss_bytes < 100_000_000, "the peak of this process is not counted"


def test_a_command_that_fails_gives_no_figure() -> None:
    with pytest.raises(RuntimeError, match="no such luck"):
        measured([sys.executable, "-c", "import sys; sys.exit('no such luck')"])


@pytest.fixture
def synthetic(tmp_path: Path) -> tuple[Path, int]:
    path = tmp_path / "huge"
    path.touch()
    os.truncate(path, SIZE_BYTES)
    return path, os.open(path, os.O_RDONLY)


def test_every_chunk_of_a_synthetic_file_is_unique_and_not_of_zeros(
    synthetic: tuple[Path, int],
) -> None:
    path, fd = synthetic
    file = SyntheticFile(str(path), -1)
    buffer = bytearray(SIZE_BYTES)
    assert file.preadv(fd, [buffer], 0) == SIZE_BYTES == file.bytes_served
    chunks = [bytes(buffer[at : at + CHUNK_BYTES]) for at in range(0, SIZE_BYTES, CHUNK_BYTES)]
    assert len(set(chunks)) == len(chunks)
    assert all(any(chunk) for chunk in chunks)
    assert file.pread(fd, CHUNK_BYTES, CHUNK_BYTES) == chunks[1], "the same however it is read"
    assert file.pread(fd, CHUNK_BYTES, SIZE_BYTES - PAGE_BYTES) == chunks[-1][-PAGE_BYTES:]
    assert file.lseek(fd, 0, os.SEEK_DATA) == 0
    assert file.lseek(fd, 0, os.SEEK_HOLE) == SIZE_BYTES
    os.close(fd)


def test_one_page_of_a_synthetic_file_can_differ(synthetic: tuple[Path, int]) -> None:
    path, fd = synthetic
    before = SyntheticFile(str(path), -1).pread(fd, SIZE_BYTES, 0)
    after = SyntheticFile(str(path), 21).pread(fd, SIZE_BYTES, 0)
    differing = [
        page
        for page in range(SIZE_BYTES // PAGE_BYTES)
        if before[page * PAGE_BYTES :][:PAGE_BYTES] != after[page * PAGE_BYTES :][:PAGE_BYTES]
    ]
    assert differing == [21]
    os.close(fd)


def test_what_forked_processes_read_is_counted(synthetic: tuple[Path, int]) -> None:
    path, fd = synthetic
    script = (
        "import os, sys\n"
        "from tools.benchmarks.synthetic import SyntheticFile\n"
        "file = SyntheticFile(sys.argv[1], -1)\n"
        "file.install()\n"
        "fd = os.open(sys.argv[1], os.O_RDONLY)\n"
        "os.pread(fd, 8192, 0)\n"
        "for count in (1, 2):\n"
        "    if os.fork() == 0:\n"
        "        os.pread(fd, count * 16384, 0)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
        "print(file.bytes_served)\n"
    )
    _, output = measured([sys.executable, "-c", script, str(path)])
    assert int(output) == 8192 + 3 * 16384
    os.close(fd)


def test_other_files_are_read_as_they_are(tmp_path: Path, synthetic: tuple[Path, int]) -> None:
    path, fd = synthetic
    other = tmp_path / "other"
    other.write_bytes(b"plain")
    with other.open("rb") as stream:
        assert SyntheticFile(str(path), -1).pread(stream.fileno(), 10, 0) == b"plain"
    os.close(fd)
