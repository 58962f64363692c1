"""``python -m metanudge``: the command, where its script is not on the path; ``torchrun -m metanudge`` too."""

import sys

from metanudge.cli import main

if __name__ == "__main__":
    sys.exit(main())
