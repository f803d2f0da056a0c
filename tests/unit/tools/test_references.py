"""The floors that growth and traffic are measured against."""

import os
import random
from pathlib import Path

from backports import zstd

from tools.benchmarks.references import (
    PAGE_BYTES,
    Shadow,
    changed_pages,
    floor_bytes,
    xor_reference,
)


def noise(size: int, seed: int) -> bytes:
    return random.Random(seed).randbytes(size)


def test_the_floor_is_one_stream_with_the_replaced_pages_as_prefix() -> None:
    old = [noise(PAGE_BYTES, number) for number in range(20)]
    new = [page[:100] + b"changed" + page[107:] for page in old]
    stream = zstd.compress(
        b"".join(new),
        options={
            zstd.CompressionParameter.compression_level: 3,
            zstd.CompressionParameter.enable_long_distance_matching: 1,
            zstd.CompressionParameter.window_log: 27,
        },
        zstd_dict=zstd.ZstdDict(b"".join(old), is_raw=True).as_prefix,
    )
    assert floor_bytes(zip(old, new, strict=True)) == len(stream) < PAGE_BYTES


def test_the_floor_of_nothing_is_nothing_and_new_pages_need_no_prefix() -> None:
    assert floor_bytes([]) == 0
    assert PAGE_BYTES < floor_bytes([(b"", noise(PAGE_BYTES, 1))]) < PAGE_BYTES + 100


def make_tree(root: Path) -> None:
    (root / "below").mkdir(parents=True)
    (root / "below" / "table").write_bytes(noise(8 * PAGE_BYTES, 1))
    (root / "gone").write_bytes(b"gone")
    (root / "link").symlink_to("gone")


def test_a_shadow_says_what_each_step_changed(tmp_path: Path) -> None:
    root = tmp_path / "data"
    make_tree(root)
    shadow = Shadow(root, tmp_path / "shadow")
    assert shadow.follow().page_bytes == 0

    with (root / "below" / "table").open("r+b") as file:
        file.seek(3 * PAGE_BYTES)
        file.write(b"changed")
    (root / "gone").unlink()
    (root / "new").write_bytes(noise(2 * PAGE_BYTES, 2))
    changed = list(changed_pages(tmp_path / "shadow", root))
    step = shadow.follow()

    assert [len(old) for old, _ in changed] == [PAGE_BYTES, 0, 0]
    assert step.page_bytes == 3 * PAGE_BYTES
    assert step.floor_bytes == floor_bytes(changed)
    assert list(changed_pages(tmp_path / "shadow", root)) == []
    assert not (tmp_path / "shadow" / "gone").exists()
    assert shadow.follow().page_bytes == 0


def test_zero_pages_cost_nobody_anything(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    make_tree(old)
    make_tree(new)
    os.truncate(new / "below" / "table", 16 * PAGE_BYTES)
    assert list(changed_pages(old, new)) == []
    assert xor_reference(old, new).new_pages == 0
