"""`python -m unidiffuser` is the command line."""

from .cli.tasks import main

main()
