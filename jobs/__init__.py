"""Training and evaluating one bundle."""

import hpc  # noqa: F401  # before torch, which wants a user's name as it is imported
