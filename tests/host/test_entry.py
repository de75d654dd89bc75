"""The entry point: import without a host, and what loading changes in one."""

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


INSIDE = """
import asyncio, os, sys
sys.path.insert(0, sys.argv[1])
from inside import NAME, load_pack, start_host

start_host()
import comfy.samplers, comfy.weight_adapter, folder_paths, nodes, torch

def state():
    return {
        "nodes": sorted(nodes.NODE_CLASS_MAPPINGS),
        "folders": {name: (list(paths), sorted(ends)) for name, (paths, ends) in folder_paths.folder_names_and_paths.items()},
        "adapters": list(comfy.weight_adapter.adapters),
        "samplers": [*comfy.samplers.KSampler.SAMPLERS, *comfy.samplers.KSampler.SCHEDULERS],
        "sys.path": list(sys.path),
        "environment": dict(os.environ),
        "random numbers": torch.get_rng_state().tolist(),
        "types": [torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled()],
    }

before, modules = state(), set(sys.modules)
pack = load_pack()
extension = asyncio.run(pack.comfy_entrypoint())
found = asyncio.run(extension.get_node_list())
print(len(found) >= 12)
print([name for name, value in state().items() if value != before[name]])
print(sorted({name.split(".")[0] for name in set(sys.modules) - modules} - {NAME, "comfy_api"}))
asyncio.run(extension.on_load())
print([name for name, value in state().items() if value != before[name]])
"""


def test_the_host_is_changed_only_when_the_extension_loads(host: tuple[Path, Path]) -> None:
    """Importing registers nothing and imports no other package; loading adds a folder and an adapter class."""
    folder, python = host
    here = str(Path(__file__).parent)
    done = subprocess.run([python, "-c", INSIDE, here], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split("\n")[-5:-1] == ["True", "[]", "[]", "['folders', 'adapters']"]


PREVIEWS = """
import sys
sys.path.insert(0, sys.argv[1])
from inside import NAME, load_pack, start_host

start_host()
load_pack()
from importlib import import_module
folders, loader, config = (import_module(f"{NAME}.{name}") for name in (
    "nodes.folders", "nodes.nodes_loader", "unidiffuser.checkpoints.config"))
folders.register()
model = loader.LoadUniDiffuser.execute(folders.BUNDLED).args[0].model
preview = model.origin.config.vae.preview_rgb
print(model.latent_format.latent_rgb_factors == preview["factors"])
print(model.latent_format.latent_rgb_factors_bias == preview["bias"])
host_model = import_module(f"{NAME}.nodes.host_model")
print(host_model.LatentFormat().latent_rgb_factors == host_model.comfy.latent_formats.SD15().latent_rgb_factors)
"""


def test_preview_colours_come_from_the_checkpoint(host: tuple[Path, Path]) -> None:
    folder, python = host
    command = [python, "-c", PREVIEWS, str(Path(__file__).parent)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-3:] == ["True", "True", "True"]


RELEASED = """
import gc, sys, weakref
sys.path.insert(0, sys.argv[1])
from inside import NAME, load_pack, start_host

start_host()
load_pack()
from importlib import import_module
import comfy.model_management, comfy.sample, torch
folders, loader = (import_module(f"{NAME}.nodes.{name}") for name in ("folders", "nodes_loader"))
folders.register()

def use():
    model, clip, vae, vision, decoder = loader.LoadUniDiffuser.execute(folders.BUNDLED).args[:5]
    cond = clip.encode_from_tokens_scheduled(clip.tokenize("red apple"))
    noise = torch.ones(1, 4, 32, 32)
    latent = comfy.sample.sample(model, noise, 2, 2.0, "euler", "normal", cond, cond, noise, seed=1, disable_pbar=True)
    vision.encode_image(vae.decode(vae.encode(vae.decode(latent))))
    return [weakref.ref(part) for part in (model.model, clip.cond_stage_model, vae.first_stage_model, vision.model)]

gc.collect()
gc.disable()
parts = use()
comfy.model_management.current_loaded_models.clear()
print([part() is None for part in parts])
"""


def test_models_are_freed_without_a_garbage_collection(host: tuple[Path, Path]) -> None:
    """Else the host warns of a memory leak when it drops them."""
    folder, python = host
    command = [python, "-c", RELEASED, str(Path(__file__).parent)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "[True, True, True, True]"


def test_importing_the_pack_does_no_work() -> None:
    done = subprocess.run([sys.executable, "-c", CODE, str(ROOT / "__init__.py")], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_library_never_reaches_for_itself_by_name() -> None:
    """Inside ComfyUI the package is in custom_nodes and not on sys.path, so imports must be relative."""
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
