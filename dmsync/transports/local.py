"""Another store on this machine: served by a process of its own, as over ssh."""

import os
import sys
from functools import partial

from dmsync.core.names import RemoteUrl
from dmsync.transports.child_process import ProcessStream
from dmsync.transports.remote_command import failure_of_silent_end


async def connect_local(url: RemoteUrl) -> ProcessStream:
    """A stream to `dm serve --stdio --home PATH`. Raises NetworkError when it cannot be run."""
    assert url.kind == "local"
    assert url.path is not None
    home = os.path.abspath(os.path.expanduser(url.path))
    # -P: modules lying about in the current directory are not ours
    arguments = [sys.executable, "-P", "-m", "dmsync", "serve", "--stdio", "--home", home]
    meaning = partial(failure_of_silent_end, where=home, through_ssh=False)
    return await ProcessStream.start(arguments, meaning)
