"""The near end of `dm serve --stdio`: a session on this process's own stdin and stdout."""

import os

from dmsync.transports.descriptor_stream import DescriptorStream


def take_stdio() -> DescriptorStream:
    """The stream over descriptors 0 and 1, once per process.

    From then on stdin is empty and what anything prints goes to stderr: a stray line on the
    stream would be read as a broken frame.
    """
    source_fd, target_fd = os.dup(0), os.dup(1)
    os.dup2(2, 1)
    nothing_fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
    os.dup2(nothing_fd, 0)
    os.close(nothing_fd)
    return DescriptorStream(source_fd, target_fd)
