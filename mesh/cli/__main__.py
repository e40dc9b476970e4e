"""`python -m mesh.cli`: the `mesh` command of this very interpreter, for drills and for where PATH lacks scripts."""

import sys

from mesh.cli import main

sys.exit(main())
