"""python -m lbi"""

import sys

from lbi.cli import main

if __name__ == "__main__":
    sys.exit(main())
