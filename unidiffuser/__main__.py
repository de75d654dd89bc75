"""`python -m unidiffuser` is the command line."""

from .cli import main

main()
