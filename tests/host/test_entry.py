"""The entry point, without a host."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CODE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("pack", sys.argv[1], submodule_search_locations=[])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert callable(module.comfy_entrypoint)
assert not hasattr(module, "NODE_CLASS_MAPPINGS")
print(sorted(name for name in ("torch", "numpy", "transformers", "comfy", "unidiffuser") if name in sys.modules))
"""


def test_importing_the_pack_does_no_work() -> None:
    done = subprocess.run([sys.executable, "-c", CODE, str(ROOT / "__init__.py")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_library_never_reaches_for_itself_by_name() -> None:
    """Inside ComfyUI the package is a part of custom_nodes and not on sys.path, so imports must be relative."""
    for path in (ROOT / "unidiffuser").glob("*.py"):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        named = [
            line
            for line in lines
            if line.startswith(("from unidiffuser", 'files("unidiffuser')) or 'files("unidiffuser")' in line
        ]
        assert not named, (path.name, named)


def test_nodes_hold_no_host_work_of_the_library() -> None:
    for path in (ROOT / "unidiffuser").rglob("*.py"):
        assert "import comfy" not in path.read_text(encoding="utf-8"), path
