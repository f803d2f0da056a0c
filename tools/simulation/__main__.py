"""Run seeds: `python -m tools.simulation SEED [--count N] [--trace]`."""

import argparse
import json
import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tools.simulation.run import Outcome


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.simulation", description=__doc__)
    parser.add_argument("seed", type=int)
    parser.add_argument("--count", type=int, default=1, help="so many seeds from SEED on")
    parser.add_argument("--trace", action="store_true", help="show what happens")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--seeded-fault", metavar="NAME", help="with a fault of tools/faults/seeded"
    )
    parser.add_argument("--stop", action="store_true", help="at the first broken promise")
    parser.add_argument("--json", action="store_true", help="tell counts and failures as JSON")
    parser.add_argument("--deadline", type=float, metavar="S", help="on the monotonic clock")
    options = parser.parse_args()
    if os.environ.get("PYTHONHASHSEED") != "0":
        # The order of sets is part of a run.
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tools.simulation", *sys.argv[1:]])
    from tools.simulation.many import broken_by, run_seeds, summary
    from tools.simulation.run import simulate

    name = options.seeded_fault
    if options.count == 1:
        trace = print if options.trace else None
        outcomes = [simulate(options.seed, trace, broken_by(name))]
    else:
        outcomes = run_seeds(
            options.seed, options.count, options.jobs, options.deadline, name, stop=options.stop
        )
    if options.json:
        json.dump(_told(outcomes), sys.stdout)
        return 1 if any(outcome.problems for outcome in outcomes) else 0
    for outcome in outcomes:
        if outcome.problems or options.count == 1:
            print(f"seed {outcome.seed}: {outcome.history_hash}; again: {outcome.repeat}")
        for problem in outcome.problems:
            print(f"  {problem}")
    print(summary(outcomes))
    return 1 if any(outcome.problems for outcome in outcomes) else 0


def _told(outcomes: "list[Outcome]") -> dict[str, object]:
    from tools.simulation.many import counts

    failures = [
        f"seed {outcome.seed}: {outcome.problems[0]}; again: {outcome.repeat}"
        for outcome in outcomes
        if outcome.problems
    ]
    return {"runs": len(outcomes), "counts": counts(outcomes), "failures": failures}


if __name__ == "__main__":
    sys.exit(main())
