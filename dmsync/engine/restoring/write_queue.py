"""Files that wait to be written, so that they are written in batches across directories."""

import os
from collections import deque
from collections.abc import Callable
from typing import Final

from dmsync.engine.restoring.file_writing import BatchReader, FileJob, write_files
from dmsync.engine.restoring.live_directory import LiveDirectory
from dmsync.storage.stages import stage

_JOBS_MAX: Final = 4096
_DESCRIPTORS_MAX: Final = 128
"""Open at once, for directories left behind and files changed in place."""


class WriteQueue:
    """Jobs and, in the order of the walk, what is to be done when those before are."""

    def __init__(self, reader: BatchReader) -> None:
        self._reader = reader
        self._jobs: list[FileJob] = []
        self._actions: deque[Callable[[], None]] = deque()
        self._descriptors: list[int] = []
        self._files_open = 0

    def add(self, job: FileJob, *, is_open: bool = False) -> None:
        """Write a file of the directory that the walk is in; `is_open`: it holds a descriptor."""
        self._jobs.append(job)
        self._files_open += is_open
        if len(self._jobs) >= _JOBS_MAX or self._is_full():
            self.flush()

    def leave(self, directory: LiveDirectory, then: Callable[[], None]) -> None:
        """The walk goes on; `then` is called once all of `directory` is written, and may use its
        descriptor."""
        if self._jobs:
            directory.fd = os.dup(directory.fd)
            self._descriptors.append(directory.fd)
        self.when_written(then)

    def when_written(self, action: Callable[[], None]) -> None:
        """Call `action` once all that was added before is written and done."""
        if not self._jobs:
            action()
            return
        self._actions.append(action)
        if self._is_full() or len(self._actions) >= _JOBS_MAX:
            self.flush()

    def _is_full(self) -> bool:
        return len(self._descriptors) + self._files_open >= _DESCRIPTORS_MAX

    def flush(self) -> None:
        """Write what waits. Raises what writing a file raises."""
        jobs, self._jobs = self._jobs, []
        self._files_open = 0
        with stage("place"):
            write_files(self._reader, jobs)
        while self._actions:
            self._actions.popleft()()
        self._close_descriptors()

    def _close_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def close(self) -> None:
        """Give up what waits."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.abandon()
        self._close_descriptors()
