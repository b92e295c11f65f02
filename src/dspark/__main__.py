"""`python -m dspark` is `dspark`."""

import sys

from dspark.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
