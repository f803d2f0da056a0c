"""Files that wait to be written, so that they are written in batches across directories."""

import os
from collections import deque
from collections.abc import Callable
from typing import Final

from dmsync.core.objects import Entry, Layout
from dmsync.engine.forking import may_fork
from dmsync.engine.restoring.block_writing import (
    FILE_BYTES_MIN,
    BlockJob,
    BlockProcesses,
    ForkedBlockWriting,
    write_in_blocks,
)
from dmsync.engine.restoring.file_writing import (
    BatchReader,
    ChangedFile,
    FileJob,
    NewFile,
    write_files,
)
from dmsync.engine.restoring.live_directory import LiveDirectory
from dmsync.engine.worker_processes import WorkerProcesses
from dmsync.storage.object_store import ObjectStore
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
        self._may_fork = True
        self._processes: BlockProcesses | None = None

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
            self._write(jobs)
        while self._actions:
            self._actions.popleft()()
        self._close_descriptors()

    def _write(self, jobs: list[FileJob]) -> None:
        large: list[BlockJob] = []
        others: list[FileJob] = []
        for job in jobs:
            if isinstance(job, NewFile | ChangedFile) and _pays_for_forking(job.entry):
                large.append(job)
            else:
                others.append(job)
        processes = self._worker_processes() if large else None
        if processes is None:
            write_files(self._reader, jobs)
            return
        try:
            write_files(self._reader, others)
        except BaseException:
            for job in large:
                job.abandon()
            raise
        write_in_blocks(self._reader, large, processes)

    def _worker_processes(self) -> BlockProcesses | None:
        if self._may_fork and isinstance(self._reader, ObjectStore):
            self._may_fork = False
            if may_fork():
                self._processes = WorkerProcesses(ForkedBlockWriting(self._reader.dot_dir))
        return self._processes

    def _close_descriptors(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def close(self) -> None:
        """Give up what waits; no process is left."""
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.abandon()
        self._close_descriptors()
        if self._processes is not None:
            self._processes.close()
            self._processes = None


def _pays_for_forking(entry: Entry) -> bool:
    return entry.layout is Layout.FIXED and entry.size >= FILE_BYTES_MIN
