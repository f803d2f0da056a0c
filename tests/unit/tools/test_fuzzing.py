"""Each decoder takes its stored corpus, which is small: what fuzzing found once stays found."""

from pathlib import Path

import pytest

from tools.fuzzing.decoders import DECODERS, fuzz_one

CORPUS = Path(__file__).parents[3] / "tools/fuzzing/corpus"


def test_every_decoder_has_a_corpus_and_all_are_small() -> None:
    assert {path.name for path in CORPUS.iterdir()} == set(DECODERS)
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < 1 << 20


@pytest.mark.parametrize("name", DECODERS)
def test_only_typed_errors_escape(name: str) -> None:
    inputs = [path.read_bytes() for path in sorted((CORPUS / name).iterdir())]
    assert inputs
    for data in [*inputs, *DECODERS[name].seeds()]:
        fuzz_one(DECODERS[name], data)
        fuzz_one(DECODERS[name], data[: len(data) // 2])
