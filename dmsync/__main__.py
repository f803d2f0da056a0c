"""`python -m dmsync` is `dm`."""

import sys

from dmsync.surfaces.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
