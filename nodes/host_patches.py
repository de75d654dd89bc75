"""The host's attention and block patches on a U-ViT, for its image tokens.

Nodes patch a U-Net in four places: the inputs of a block's self-attention, the attention itself, its output, and whole blocks.
A U-ViT has one attention over all tokens. For an image token it is, exactly, a mixture of the attention to the image tokens (a
U-Net's self-attention, "attn1"), to the text (its cross-attention, "attn2") and to the other tokens, weighted by their shares
of the softmax. So a patch replaces or changes its own part, and a patch that changes nothing gives the unpatched result.

Blocks are numbered ("input", 0..), ("middle", 0), ("output", 0..), and in one sequence for patches of DiT layers.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from comfy.ldm.modules.attention import optimized_attention
from torch import Tensor

from .side_streams import SIDE
from .unet_names import BasicTransformerBlock, Place

ATTENTION = ("attn1_patch", "attn1_output_patch", "attn2_patch", "attn2_output_patch")
BLOCKS = ("input_block_patch", "input_block_patch_after_skip", "output_block_patch", "middle_block_after_patch")
HANDLED = {*ATTENTION, *BLOCKS, "middle_patch"}
SPOILING = {  # classes of other packs whose patches act, but were fitted to the blocks of one other model
    "attention_modifier": "The attention modifiers of 'Automatic CFG' are fitted to the blocks of SDXL and can distort the "
    "picture here. For its guidance alone use the node 'Automatic CFG' or a preset 'Original automatic CFG'."
}


class Patches:
    """The patches of one call of the network.

    Args:
        options: the transformer_options of the call.
        heads: attention heads.
        grid: (rows, columns) of image tokens, which are the last of the sequence.
        text: (first, last + 1) positions of the text tokens.
        depth: number of blocks; half of them, rounded down, are input blocks.
        named: the blocks under a U-Net's names, by place.
    """

    def __init__(
        self,
        options: dict[str, Any],
        heads: int,
        grid: tuple[int, int],
        text: tuple[int, int],
        depth: int,
        named: dict[Place, BasicTransformerBlock],
    ):
        self.wrapped = {place: block for place, block in named.items() if block.wrapped}
        self.options, self.heads, self.grid, self.text, self.depth = options, heads, grid, text, depth
        self.patches: dict[str, list[Any]] = options.get("patches") or {}
        self.replace: dict[str, dict[Any, Any]] = options.get("patches_replace") or {}
        self.notes = getattr(options.get(SIDE), "notes", None)
        self._check()

    def __bool__(self) -> bool:
        return bool(any(self.patches.values()) or any(self.replace.values()) or self.wrapped)

    def _check(self) -> None:
        """Warn of patches for blocks or places that this network has not."""
        half = self.depth // 2
        last = {
            "input": half - 1,
            "middle": 0,
            "output": half - 1,
            "double_block": self.depth - 1,
            "single_block": self.depth - 1,
        }
        beyond: dict[tuple[str, str], list[int]] = {}
        for kind, found in self.replace.items():
            for place, patch in found.items():
                name, number = place[0], place[1] if len(place) > 1 else 0
                if kind not in ("attn1", "attn2", "dit") or name not in last:
                    self._foreign(kind, patch)
                elif number > last[name]:
                    beyond.setdefault((node_of(patch), name), []).append(number)
                elif advice := SPOILING.get(node_of(patch)):
                    self._note(advice)
        for (node, name), numbers in beyond.items():
            named = ", ".join(str(number) for number in sorted(set(numbers)))
            self._note(f"'{node}' names {name} {named}; this model has {name} 0 to {last[name]}, so it has no effect there.")
        for kind, patches in self.patches.items():
            for patch in patches:
                if kind not in HANDLED:
                    self._foreign(kind, patch)

    def _foreign(self, kind: str, patch: Any) -> None:
        self._note(f"'{node_of(patch)}' patches '{kind}' of another kind of model, so it has no effect on UniDiffuser.")

    def _note(self, text: str) -> None:
        if self.notes is not None:
            self.notes.warn(text)

    def extra(self, place: Place, index: int, x: Tensor) -> dict[str, Any]:
        """The options that an attention patch receives; `original_shape` is that of the image tokens, (B, C, rows, columns)."""
        own = {k: v for k, v in self.options.items() if k not in ("patches", "patches_replace")}
        return own | {
            "n_heads": self.heads,
            "dim_head": x.shape[-1] // self.heads,
            "attn_precision": None,
            "block": place,
            "block_index": 0,
            "transformer_index": index,
            "original_shape": [len(x), x.shape[-1], *self.grid],
        }

    def replacing(self, kind: str, place: Place) -> Callable[..., Tensor] | None:
        """The patch that replaces the attention "attn1" or "attn2" of a block."""
        found = self.replace.get(kind, {})
        return found.get((*place, 0), found.get(place))

    # Blocks

    def run(self, block: Any, x: Tensor, skip: Tensor | None, place: Place, index: int) -> Tensor:
        """One block of the network on tokens (B, N, D); `index` counts all blocks."""
        if skip is not None:
            x, skip = self._output(x, skip, place)
            x = block.norm1(block.skip_linear(torch.cat([x, skip], dim=-1)))

        def body(tokens: Tensor) -> Tensor:
            tokens = tokens + self.attend(block.attn, tokens, place, index)
            for patch in self.patches.get("middle_patch", []):
                raise ValueError(
                    f"'{node_of(patch)}' is made for the blocks of a U-Net and does not fit UniDiffuser. Remove it."
                )
            tokens = block.norm2(tokens)
            return block.norm3(tokens + block.mlp(tokens))

        layer = self._layer(index)
        if place in self.wrapped:
            x = self._wrapped(self.wrapped[place], body, x)
        else:
            x = body(x) if layer is None else self._dit(layer, body, x)
        if place[0] == "middle":
            return self._middle(x, place)
        return x

    def _wrapped(self, named: BasicTransformerBlock, body: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A block whose forward a node has wrapped, as of a U-Net: the wrapper sees the image tokens."""
        others, count = x[:, : -self._count], self._count

        def inner(image: Tensor) -> Tensor:
            nonlocal others
            out = body(torch.cat([others, image], dim=1))
            others = out[:, :-count]
            return out[:, -count:]

        named.body = inner
        try:
            image = named.forward(x[:, -count:], context=x[:, slice(*self.text)], transformer_options=self.options)
        finally:
            named.body = None
        return torch.cat([others, image], dim=1)

    def _layer(self, index: int) -> Callable[..., Any] | None:
        found = self.replace.get("dit", {})
        return found.get(("double_block", index), found.get(("single_block", index)))

    def _dit(self, layer: Callable[..., Any], body: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """A block as a layer of a DiT: a patch of (arguments, {"original_block"})."""
        count = self._count

        def original(arguments: dict[str, Any]) -> dict[str, Any]:
            out = body(torch.cat([arguments["txt"], arguments["img"]], dim=1))
            return {**arguments, "img": out[:, -count:], "txt": out[:, :-count]}

        arguments = {"img": x[:, -count:], "txt": x[:, :-count], "vec": None, "pe": None, "transformer_options": self.options}
        extra = {"original_block": original, "transformer_options": self.options}
        out = self._call(layer, arguments, extra)
        return torch.cat([out.get("txt", x[:, :-count]), out["img"]], dim=1)

    def input(self, x: Tensor, place: Place, kind: str) -> Tensor:
        """After an input block: "input_block_patch" before its long skip is taken, "input_block_patch_after_skip" behind."""
        for patch in self.patches.get(kind, []):
            image = self._map(x)
            found = self._call(patch, image.clone(), {**self.options, "block": place, "original_shape": list(image.shape)})
            x = self._place(x, image, found, patch)
        return x

    def _output(self, x: Tensor, skip: Tensor, place: Place) -> tuple[Tensor, Tensor]:
        for patch in self.patches.get("output_block_patch", []):
            image, long = self._map(x), self._map(skip)
            options = {**self.options, "block": place, "original_shape": list(image.shape)}
            found, found_skip = self._call(patch, image.clone(), long.clone(), options)
            x, skip = self._place(x, image, found, patch), self._place(skip, long, found_skip, patch)
        return x, skip

    def _middle(self, x: Tensor, place: Place) -> Tensor:
        for patch in self.patches.get("middle_block_after_patch", []):
            image = self._map(x)
            options = {**self.options, "block": place}
            arguments = {"h": image.clone(), "x": image, "emb": None, "context": None, "y": None, "timesteps": None}
            found = self._call(patch, {**arguments, "transformer_options": options})
            x = self._place(x, image, found["h"], patch)
        return x

    @property
    def _count(self) -> int:
        return self.grid[0] * self.grid[1]

    def _map(self, x: Tensor) -> Tensor:
        """The image tokens as a map (B, D, rows, columns)."""
        return x[:, -self._count :].transpose(1, 2).unflatten(2, self.grid)

    def _place(self, x: Tensor, before: Tensor, after: Tensor, patch: Any) -> Tensor:
        """x with the image tokens of a map that a patch returned."""
        name = node_of(patch)
        if after.shape != before.shape:
            raise ValueError(
                f"'{name}' resizes the layers of a U-Net, which UniDiffuser, a transformer, has not. Remove it; for larger "
                f"pictures use a second pass from a scaled latent."
            )
        if self.notes is not None:
            self.notes.acted(name, not torch.equal(before, after))
        return torch.cat([x[:, : -self._count], after.flatten(2).transpose(1, 2).to(x)], dim=1)

    # Attention

    def attend(self, attn: Any, x: Tensor, place: Place, index: int) -> Tensor:
        """The projected attention of a block for tokens x (B, N, D), with the patches on the image tokens."""
        before, after = self.patches.get("attn1_patch", []), self.patches.get("attn1_output_patch", [])
        before2, after2 = self.patches.get("attn2_patch", []), self.patches.get("attn2_output_patch", [])
        one, two = self.replacing("attn1", place), self.replacing("attn2", place)
        if not (before or after or before2 or after2 or one or two):
            return attn(x)
        extra, lead = self.extra(place, index, x), x.shape[1] - self._count
        image, text = x[:, lead:], x[:, slice(*self.text)]
        rest = torch.cat([x[:, : self.text[0]], x[:, self.text[1] : lead]], dim=1)
        q, k, v = attn.qkv(x).chunk(3, dim=-1)
        own = optimized_attention(q[:, :lead], k, v, self.heads, transformer_options=self.options)

        inputs = self._changed(before, (image, image, image), extra)
        parts = [(self._projected(attn, inputs), one)]
        if before2 or after2 or two:
            parts += [(self._projected(attn, self._changed(before2, (inputs[0], text, text), extra)), two)]
            others = rest
        else:
            others = x[:, :lead]
        parts += [(self._projected(attn, (inputs[0], others, others)), None)]
        found = self._mixture(parts, extra)
        if after2:
            own_text = self._outputs(after2, attn.proj(found[1]), extra)
            out = attn.proj(found[0] + found[2]) + own_text - attn.proj(torch.zeros_like(x[:1, :1]))  # its bias once
        else:
            out = attn.proj(torch.stack(found).sum(0))
        return torch.cat([attn.proj(own), self._outputs(after, out, extra)], dim=1)

    def _changed(self, patches: list[Any], inputs: tuple[Tensor, ...], extra: dict[str, Any]) -> tuple[Tensor, ...]:
        for patch in patches:
            inputs = tuple(self._call(patch, *inputs, extra))
        return inputs

    def _outputs(self, patches: list[Any], out: Tensor, extra: dict[str, Any]) -> Tensor:
        for patch in patches:
            out = self._call(patch, out, extra)
        return out

    def _projected(self, attn: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """q, k, v of (image tokens, keys, values).

        A patch may split the image tokens into tiles along the batch. Keys as many as these are split alike, in raster order as
        in the host; others are repeated.
        """
        dim, found = inputs[0].shape[-1], {id(x): attn.qkv(x) for x in inputs}
        q, k, v = (found[id(x)][..., i * dim : (i + 1) * dim] for i, x in enumerate(inputs))
        if len(q) != len(k) and q.numel() == k.numel():
            return q, k.reshape(len(q), -1, dim), v.reshape(len(q), -1, dim)
        times = len(q) // len(k)
        return q, k.repeat_interleave(times, dim=0), v.repeat_interleave(times, dim=0)

    def _mixture(self, parts: list[Any], extra: dict[str, Any]) -> list[Tensor]:
        """Attention to each part (B, L, D), times the part's share of the whole softmax."""
        outs, masses = [], []
        for (q, k, v), patch in parts:
            if patch is None:
                outs.append(optimized_attention(q, k, v, self.heads, transformer_options=self.options))
            else:
                outs.append(self._call(patch, q, k, v, extra))
            masses.append(self._mass(q, k))
        shares = torch.stack(masses).softmax(0).transpose(2, 3)  # (parts, B, L, heads)
        width = outs[0].shape[-1] // self.heads
        return [out * share.repeat_interleave(width, dim=2).to(out) for out, share in zip(outs, shares, strict=True)]

    def _mass(self, q: Tensor, k: Tensor) -> Tensor:
        """(B, heads, L) log of the sum of exponentiated scores."""
        q, k = (x.unflatten(2, (self.heads, -1)).transpose(1, 2).float() for x in (q, k))
        return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).logsumexp(-1)

    def _call(self, patch: Callable[..., Any], *arguments: Any) -> Any:
        """What a patch returns.

        Raises:
            ValueError: it fails, with its node's name.
        """
        try:
            return patch(*arguments)
        except (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError) as error:
            node = node_of(patch)
            cure = "Remove COUPLE from the prompt; AND with MASK works." if "prompt-control" in node else "Remove this node."
            raise ValueError(
                f"The patch of '{node}' is made for another kind of model and does not fit UniDiffuser ({error}). {cure}"
            ) from error


def transform(net: Any, x: Tensor, patches: Patches) -> Tensor:
    """`UViT.transform` with patches: tokens (B, N, D) through the U."""
    skips, half = [], len(net.in_blocks)
    for number, block in enumerate(net.in_blocks):
        place = ("input", number)
        x = patches.run(block, x, None, place, number)
        x = patches.input(x, place, "input_block_patch")
        skips.append(x)
        x = patches.input(x, place, "input_block_patch_after_skip")
    x = patches.run(net.mid_block, x, None, ("middle", 0), half)
    for number, block in enumerate(net.out_blocks):
        x = patches.run(block, x, skips.pop(), ("output", number), half + 1 + number)
    return x


def node_of(patch: Any) -> str:
    """A patch's node: the class that defined it, else the function and its pack."""
    function = getattr(patch, "func", patch)
    function = function if hasattr(function, "__qualname__") else type(function)
    first = str(function.__qualname__).split(".")[0]
    if first == getattr(function, "__name__", ""):
        pack = re.split(r"[/\\]", str(function.__module__))[-1].split(".")[0]
        return f"{first} of {pack}"
    return first
