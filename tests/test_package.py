"""The package as its users meet it: imports, help, types and documentation."""

from __future__ import annotations

import importlib
import inspect
import os
import pydoc
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path
from types import FunctionType, ModuleType

import pytest

import unidiffuser

ROOT = Path(__file__).parents[1]
LAZY = "import sys, unidiffuser; dir(unidiffuser); sys.exit(any(m in sys.modules for m in ('torch', 'numpy', 'PIL')))"
PUBLIC = ["unidiffuser"] + [
    f"{package.replace('/', '.')}.{file.stem}"
    for package in ("unidiffuser", "unidiffuser/checkpoints", "unidiffuser/encoders")
    for file in sorted((ROOT / package).glob("[a-z]*.py"))
]


def public(module: ModuleType) -> dict[str, type | FunctionType]:
    """The public classes, functions and methods that a module defines, by their qualified names."""
    found: dict[str, type | FunctionType] = {}
    for name, value in vars(module).items():
        if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
            continue
        if inspect.isclass(value):
            methods = {
                key: getattr(member, "__func__", member)
                for key, member in vars(value).items()
                if key in ("__init__", "__call__") or key[0] != "_"
            }
            found |= {f"{name}.{key}": member for key, member in methods.items() if inspect.isfunction(member)}
        if inspect.isclass(value) or inspect.isfunction(value):
            found[name] = value
    return found


def test_importing_the_package_imports_neither_torch_nor_numpy() -> None:
    subprocess.run([sys.executable, "-c", LAZY], cwd=ROOT, check=True)


def test_help_shows_what_is_imported_on_first_use() -> None:
    text = pydoc.render_doc(unidiffuser, renderer=pydoc.plaintext)
    assert "class UniDiffuser(" in text
    assert "text_to_image(self, prompt" in text
    assert "load(name_or_path" in text


@pytest.mark.parametrize("name", PUBLIC)
def test_type_hints_of_the_public_names_can_be_read(name: str) -> None:
    for value in public(importlib.import_module(name)).values():
        typing.get_type_hints(value)


def test_the_package_ships_its_types() -> None:
    assert (ROOT / "unidiffuser" / "py.typed").is_file()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text("utf-8")


def documents() -> list[Path]:
    """The pages at the top, the guides and the results; the host resolves the links of help pages by itself."""
    return [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/results").glob("*.md")]


@pytest.mark.parametrize("page", documents(), ids=lambda page: str(page.relative_to(ROOT)))
def test_links_between_files_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text("utf-8"), flags=re.DOTALL)
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    files = [link.split("#")[0].replace("%20", " ") for link in links if "://" not in link]
    assert [file for file in files if not (page.parent / file).exists()] == []


def test_extras_that_texts_name_exist() -> None:
    project = (ROOT / "pyproject.toml").read_text("utf-8")
    extras = re.findall(r"^(\w+) = \[", project.split("[project.optional-dependencies]")[1].split("\n\n")[0], re.MULTILINE)
    for file in [*documents(), *(ROOT / "unidiffuser").rglob("*.py")]:
        for named in re.findall(r"""["'](?:unidiffuser|\.)\[([\w,]+)\]["']""", file.read_text("utf-8")):
            assert set(named.split(",")) <= set(extras), file


@pytest.mark.slow
def test_a_typed_script_passes_mypy(tmp_path: Path) -> None:
    pytest.importorskip("mypy")
    script = shutil.copy(Path(__file__).with_name("typed_use.py"), tmp_path)  # outside the package that the checkout is
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=", script]
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(ROOT)}, capture_output=True)
    assert done.returncode == 0, done.stdout.decode()


@pytest.mark.slow
def test_the_library_example_of_the_readme_runs_as_it_stands() -> None:
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    assert example is not None
    found: dict[str, typing.Any] = {}
    exec(example[1], found)
    assert found["captions"] == ["red apple, twemoji"] * 4
    assert found["out"].img.shape[0] == 4
