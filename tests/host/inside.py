"""The host's modules and this pack in ComfyUI's own interpreter, without its server.

For scripts that are started with the host's folder as the working directory.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
NAME = "unidiffuser_pack"


def start_host() -> None:
    """Import the modules that the host imports before custom nodes, set to the CPU."""
    arguments, sys.argv = sys.argv, [sys.argv[0], "--cpu"]
    sys.path.insert(0, os.getcwd())
    import comfy.options

    comfy.options.enable_args_parsing()
    import comfy.cli_args

    sys.argv = arguments
    for name in ("utils.extra_config", "nodes", "server"):  # in main.py's order: nodes brings another "utils" into the path
        importlib.import_module(name)


def load_pack() -> ModuleType:
    """This pack as a module of the host."""
    spec = importlib.util.spec_from_file_location(NAME, ROOT / "__init__.py", submodule_search_locations=[str(ROOT)])
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    return module
