"""`python -m amtl` is the command `amtl`."""

from amtl.cli import main

main()
