"""`python -m medmask`."""

import sys

from medmask.cli import main

sys.exit(main(sys.argv[1:]))
