"""Training and evaluating one bundle."""

import hpc  # noqa: F401  # before torch, whose import needs a user name
