"""The benchmarks are no part of the package, so the tests find them in the checkout."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
