"""`python -m dsv3_jax.cli`: the same as `dsv3`."""

import sys

from dsv3_jax.cli.main import main

sys.exit(main())
