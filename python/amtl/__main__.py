"""`python -m amtl` is the command `amtl`."""

from amtl_command import main

main()
