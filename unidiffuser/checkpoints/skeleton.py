"""Modules built on loaded weights, without random initialisation or a copy."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from typing_extensions import Self

_WEIGHT_FACTORIES = {torch.empty, torch.zeros, torch.rand, torch.randn}
_FILL = re.compile(r"(?!requires_grad_)\w*[a-z]_")  # normal_, zeros_, copy_, ...


class skeleton(TorchFunctionMode):  # in lower case: used like a function
    """Context for building modules with weights on "meta" and real constant tables.

    Weights come from torch.empty, zeros, rand and randn and go to "meta". Tables of positions and masks come from arange, ones
    and the like and keep their values, since no checkpoint holds them; `torch.device("meta")` would lose them. Filling a weight
    does nothing: random numbers for "meta" make torch import its compiler, which takes a second and 80 MB.

    A module that is built while a caller runs in inference mode outlives that call, so its tensors are normal ones.
    """

    def __enter__(self) -> Self:
        self._normal = torch.inference_mode(False)
        self._normal.__enter__()
        return super().__enter__()

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._normal.__exit__(*raised)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _WEIGHT_FACTORIES:
            kwargs["device"] = "meta"
        target = args[0] if args else kwargs.get("tensor")  # the name in torch.nn.init
        if isinstance(target, Tensor) and target.is_meta and _FILL.fullmatch(getattr(func, "__name__", "")):
            return target
        return func(*args, **kwargs)


def assign_weights(module: nn.Module, tensors: Mapping[str, Tensor], where: str, help_text: str = "") -> None:
    """Make given tensors the parameters and buffers of a module, without a copy.

    Tied parameters stay tied, and one of their names is enough.

    Args:
        module: usually built in `skeleton`.
        tensors: for each parameter and persistent buffer a tensor, by its name in the module.
        where: subject of the error text, such as "the autoencoder in FILE".
        help_text: end of the error text: what to do.

    Raises:
        ValueError: names or shapes differ; names the first missing, unexpected and misshapen tensor.
    """
    members: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    stored = set(module.state_dict())
    members |= {name: buffer for name, buffer in module.named_buffers() if name in stored}
    given = {id(members[name]): tensor for name, tensor in tensors.items() if name in members}

    missing = [name for name, member in members.items() if id(member) not in given]
    unexpected = [name for name in tensors if name not in members]
    quantised = [
        name
        for name, tensor in tensors.items()
        if name in members and members[name].is_floating_point() and not tensor.is_floating_point()
    ]
    if quantised:
        kind = str(tensors[quantised[0]].dtype).removeprefix("torch.")
        raise ValueError(
            f"{where} holds {kind} numbers, as {quantised[0]}; use float32, float16 or bfloat16 weights. {help_text}"
        )
    misshapen = [
        f"{name} is {tuple(tensors[name].shape)}, should be {tuple(members[name].shape)}"
        for name in tensors
        if name in members and tensors[name].shape != members[name].shape
    ]
    problems = [
        f"{len(names)} {kind} (first: {names[0]})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
        if names
    ]
    if problems:
        raise ValueError(f"{where} does not fit the network: {'; '.join(problems)}. {help_text}".rstrip())

    made: dict[int, nn.Parameter] = {}
    for name, member in members.items():
        path, _, leaf = name.rpartition(".")
        owner = module.get_submodule(path)
        if isinstance(member, nn.Parameter):
            if id(member) not in made:
                made[id(member)] = nn.Parameter(given[id(member)], requires_grad=member.requires_grad)
            owner._parameters[leaf] = made[id(member)]
        else:
            owner._buffers[leaf] = given[id(member)]
