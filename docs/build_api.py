"""Write the API reference to docs/api with pdoc.

python docs/build_api.py
"""

from __future__ import annotations

import pkgutil
from pathlib import Path

import pdoc

import unidiffuser
from unidiffuser import pipeline

LEFT_OUT = ("unidiffuser.emoji", "unidiffuser.__main__")


def main() -> None:
    """Document every module but those of the bundled model's workshop."""
    # NOTE: pdoc reads a module's dictionary, where these two appear with their first use only.
    vars(unidiffuser).update(UniDiffuser=pipeline.UniDiffuser, load=pipeline.load)
    found = [module.name for module in pkgutil.iter_modules(unidiffuser.__path__, "unidiffuser.")]
    names = ["unidiffuser", *(name for name in found if name not in LEFT_OUT)]
    pdoc.render.configure(docformat="google", search=True)
    pdoc.pdoc(*names, output_directory=Path(__file__).with_name("api"))


if __name__ == "__main__":
    main()
