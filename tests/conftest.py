"""Fixtures and rules for all tests: nothing of the user's home is touched, CI skips nothing."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Cluster, Clusters, MakeCluster

# A shell's background job ignores SIGINT, and so would everything that is started here.
signal.signal(signal.SIGINT, signal.default_int_handler)

NOTHING_MAY_BE_SKIPPED = os.environ.get("CI", "").lower() == "true"


@pytest.fixture(scope="session", autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test sees the user's home, store, keys or agent."""
    with pytest.MonkeyPatch.context() as patch:
        for name in list(os.environ):
            if name.startswith("DM_") or name in ("SSH_AUTH_SOCK", "XDG_DATA_HOME"):
                patch.delenv(name)
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture
def make_cluster(tmp_path: Path) -> Iterator[MakeCluster]:
    """Makes named clusters; all their servers end with the test."""
    with Clusters(tmp_path) as clusters:
        yield clusters


@pytest.fixture
def cluster(make_cluster: MakeCluster) -> Cluster:
    """One cluster, not serving."""
    return make_cluster("solo")


@pytest.fixture
def pair(make_cluster: MakeCluster) -> tuple[Cluster, Cluster]:
    """Two clusters, `near` and `far`; `near` knows `far` as the remote `far`."""
    near, far = make_cluster("near"), make_cluster("far")
    near.add_remote("far", far)
    return near, far


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Any:
    """Where nothing may be skipped, a skip is a failure that says what was missing."""
    report = yield
    return _skip_as_failure(report)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Any:
    """The same for a whole module that skips itself."""
    report = yield
    return _skip_as_failure(report)


def _skip_as_failure(report: Any) -> Any:
    expected_failure = hasattr(report, "wasxfail")
    if NOTHING_MAY_BE_SKIPPED and report.skipped and not expected_failure:
        report.outcome = "failed"
        report.longrepr = f"skipped although CI is set: {report.longrepr}"
    return report
