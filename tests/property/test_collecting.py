"""After any commands and any gc, what is named is as it was, and what is not is gone.

DM_TEST_LONG=1 runs 300 histories.
"""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.collected_history import CollectedHistory

HISTORIES = 300 if os.environ.get("DM_TEST_LONG") else 8
STEPS = 10


@settings(max_examples=HISTORIES, deadline=None, derandomize=not os.environ.get("DM_TEST_LONG"))
@given(
    st.integers(0, 2**32), st.lists(st.sampled_from(("0", "14d", "90m")), min_size=2, max_size=3)
)
def test_random_histories_with_gc_keep_what_is_named(seed: int, graces: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch, pytest.MonkeyPatch.context() as patch:
        history = CollectedHistory(Path(scratch), seed, patch)
        for grace in [*graces, "0"]:
            for _ in range(STEPS):
                history.step()
            history.collect(grace)
