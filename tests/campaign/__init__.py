"""Campaigns against the project: hostile inputs, damage, kills, full disks. See README.md."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # campaigns use the tests' runs
