"""Campaigns against the project: damaged files, other options, kills. See README.md."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # campaigns use the tests' runs
os.environ.setdefault("JAX_PLATFORMS", "cpu")  # before JAX is imported
