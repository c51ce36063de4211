"""python -m urm_kernels: the report of urm_kernels.env."""

from .env import report

print(report())
