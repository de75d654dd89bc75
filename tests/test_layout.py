"""The layout of the package: imports go one way, and only `nodes/` imports the host."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "unidiffuser"
HOST = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "folder_paths", "latent_preview", "server", "nodes"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in PACKAGE.rglob("*.py")
}


def imports(module: str) -> set[str]:
    """Absolute names that a module imports, anywhere in it, those for type checkers included."""
    path, found = MODULES[module], set()
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *filter(None, [node.module])])
            found |= {name if (name := f"{source}.{alias.name}") in MODULES else source for alias in node.names}
    return found


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The names of one circle in a graph, or []."""
    done: set[str] = set()

    def follow(name: str, way: list[str]) -> list[str]:
        if name in way:
            return way[way.index(name) :]
        if name not in done:
            for other in sorted(graph.get(name, ())):
                if found := follow(other, [*way, name]):
                    return found
            done.add(name)
        return []

    return next((found for name in sorted(graph) if (found := follow(name, []))), [])


def test_modules_import_in_no_circle() -> None:
    assert circle({module: (imports(module) & MODULES.keys()) - {module} for module in MODULES}) == []


def test_packages_import_in_no_circle() -> None:
    def place(module: str) -> str:
        return ".".join(module.split(".")[:2])

    graph: dict[str, set[str]] = {}
    for module in MODULES:
        others = {place(other) for other in imports(module) & MODULES.keys()}
        graph.setdefault(place(module), set()).update(others - {place(module)})
    assert circle(graph) == []


def test_the_library_does_not_import_the_host() -> None:
    assert {(module, name) for module in MODULES for name in imports(module) if name.split(".")[0] in HOST} == set()


def test_random_numbers_do_not_depend_on_torchs_defaults() -> None:
    """Every draw from a generator names its device, and its number format if that is not of whole numbers."""
    found = []
    for path in [*PACKAGE.rglob("*.py"), *(ROOT / "nodes").rglob("*.py")]:
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(call.func).removeprefix("torch.") if isinstance(call, ast.Call) else ""
            if isinstance(call, ast.Call) and name in ("rand", "randn", "randint", "randperm", "normal"):
                named = {keyword.arg for keyword in call.keywords}
                wanted = {"device"} if name in ("randint", "randperm") else {"device", "dtype"}
                if "generator" in named and wanted - named:
                    found.append(f"{path.name}:{call.lineno}")
    assert found == []


def test_the_top_of_the_package_stays_small() -> None:
    assert len([path for path in PACKAGE.iterdir() if path.name != "__pycache__"]) <= 28
