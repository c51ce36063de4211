"""``python -m urm_kernels.bench`` measures here and prints a table."""

from .command import main

main()
