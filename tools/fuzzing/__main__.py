"""`python -m tools.fuzzing NAME... --runs N --seed S [--keep]`: fuzz decoders with atheris.

One process imports and instruments; each decoder is fuzzed in a child of it, by libFuzzer with
`-seed`, so that a run can be repeated. Prints one line of JSON for each. `--keep` stores as
its corpus the smallest inputs that reached something new.
"""

import argparse
import json
import os
import random
import re
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import atheris
from blake3 import blake3

CORPUS: Final = Path(__file__).parent / "corpus"
INPUT_BYTES_MAX: Final = 8192
INPUT_TIMEOUT_S: Final = 10
MEMORY_MIB_MAX: Final = 1024
KEPT_BYTES_MAX: Final = 36 * 1024
"""Of one decoder's corpus."""

with atheris.instrument_imports(include=["dmsync"]):
    from tools.fuzzing.decoders import DECODERS, Decoder, fuzz_one
    from tools.fuzzing.mutating import mutated


def _mutate(decoder: Decoder, data: bytes, size_max: int, seed: int) -> bytes:
    rng = random.Random(seed)
    if decoder.is_value and rng.random() < 0.5:
        changed = mutated(data, rng)
        if changed is not None and len(changed) <= size_max:
            return changed
    found: bytes = atheris.Mutate(data, size_max)
    return found


def _fuzz(name: str, options: argparse.Namespace, scratch: str) -> None:
    """In a child: never returns."""
    decoder = DECODERS[name]
    arguments = [
        name,
        f"-runs={options.runs}",
        f"-seed={options.seed or 1}",
        f"-max_len={INPUT_BYTES_MAX}",
        f"-timeout={INPUT_TIMEOUT_S}",
        f"-rss_limit_mb={MEMORY_MIB_MAX}",
        f"-artifact_prefix={scratch}/",
        "-print_final_stats=1",
        *options.directories,
    ]

    def mutate(data: bytes, size_max: int, seed: int) -> bytes:
        return _mutate(decoder, data, size_max, seed)

    atheris.Setup(arguments, lambda data: fuzz_one(decoder, data), custom_mutator=mutate)
    atheris.Fuzz()


@contextmanager
def _scratch_directory() -> Iterator[str]:
    """Removed here alone: a child that ends would run what a TemporaryDirectory left to do."""
    path = tempfile.mkdtemp(prefix="dm-fuzz-")
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Fuzz one decoder in a child process and say what became of it."""
    with _scratch_directory() as scratch:
        corpus = os.path.join(scratch, "corpus")
        stored = CORPUS / name
        shutil.copytree(stored, corpus) if stored.is_dir() else os.mkdir(corpus)
        for number, seed in enumerate(DECODERS[name].seeds()):
            Path(corpus, f"seed-{number}").write_bytes(seed)
        options.directories = [corpus]
        code, said = _in_child(name, options, scratch)
        runs = re.search(r"stat::number_of_executed_units:\s+(\d+)", said)
        crashes = [f for f in os.listdir(scratch) if re.match("crash|timeout|oom", f)]
        found = {
            "name": name,
            "runs": int(runs.group(1)) if runs else 0,
            "covered": max(map(int, re.findall(r"cov: (\d+)", said)), default=0),
            "failed": code != 0 or bool(crashes),
            "said": said[-3000:] if code else "",
            "inputs": [Path(scratch, crash).read_bytes().hex()[:4000] for crash in crashes],
        }
        if options.keep and not found["failed"]:
            _keep(name, corpus)
    return found


def _in_child(name: str, options: argparse.Namespace, scratch: str) -> tuple[int, str]:
    output = os.path.join(scratch, "output")
    child = os.fork()
    if child == 0:
        fd = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(fd, 1)
        os.dup2(fd, 2)
        try:
            _fuzz(name, options, scratch)
        except BaseException:
            traceback.print_exc()
        os._exit(1)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), Path(output).read_text("utf-8", "replace")


def _keep(name: str, corpus: str) -> None:
    """Store the smallest of the inputs that each reached something new, up to a size."""
    target = CORPUS / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    left = KEPT_BYTES_MAX
    for path in sorted(Path(corpus).iterdir(), key=lambda path: (path.stat().st_size, path.name)):
        left -= path.stat().st_size
        if left < 0:
            break
        content = path.read_bytes()
        (target / blake3(content).hexdigest()[:16]).write_bytes(content)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.fuzzing", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(DECODERS))
    parser.add_argument("--runs", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--reproduce", help="one input as hex")
    options = parser.parse_args()
    if options.reproduce:
        fuzz_one(DECODERS[options.names[0]], bytes.fromhex(options.reproduce))
        return 0
    failed = False
    for name in options.names or DECODERS:
        found = _run(name, options)
        failed = failed or found["failed"]
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
