"""`python -m medmask.launch`: see `medmask.launch.launcher`."""

import sys

from medmask.launch.launcher import main

if __name__ == "__main__":
    sys.exit(main())
