"""Stage 4: the U-ViT, on latents that the frozen encoders make once and that are kept in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..path import NoisePath
from ..samplers import sample
from ..streams import Streams, item_generators
from ..uvit import UViT, UViTConfig
from .autoencoder import PatchedAutoencoder
from .captioner import load_captioner
from .data import ImageFolder
from .encoders import image_tokens, load_clip
from .loop import Stage, TrainConfig, seeded_init
from .objective import PAPER, diffusion_loss

SCALE = 0.18215


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention written out, (B, heads, L, d) -> (B, L, heads * d): for a few dozen tokens on a CPU, where the backward pass
    of the fused kernel takes longer than all matrix products together."""
    weights = (q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    return (weights.float().softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)


class Latents:
    """Pairs as latents: moments of the autoencoder, CLIP image tokens, and the text latent of each caption of a picture."""

    def __init__(self, images: ImageFolder, autoencoder: Path, encoders: Path, captioner: Path, sizes: dict[str, Any]):
        vae = PatchedAutoencoder(sizes["patch_size"], tuple(sizes["channels"]), sizes["layers"])
        vae.load_state_dict(torch.load(autoencoder / "autoencoder.pt", weights_only=True))
        self.vae = vae.eval().requires_grad_(False)
        clip, tokenizer, clip_sizes = load_clip(encoders)
        self.captioner = load_captioner(captioner)
        means, logvars, tokens = [], [], []
        with torch.no_grad():
            for chunk in torch.arange(len(images)).split(64):
                pixels = images.pixels(chunk)
                mean, logvar = vae.moments(pixels)
                means.append(mean)
                logvars.append(logvar)
                tokens.append(image_tokens(clip, pixels))
            texts = sorted({text for record in images.records for text in record["text"]})
            ids = tokenizer(texts, clip_sizes["clip_text"]["max_position_embeddings"])
            self.text = torch.cat(
                [self.captioner.encode_prefix(clip.text_model(input_ids=c).last_hidden_state) for c in ids.split(256)]
            )
        self.mean, self.std = torch.cat(means), (0.5 * torch.cat(logvars)).exp()
        self.clip_img = torch.cat(tokens)[:, None]
        self.numbers = {text: i for i, text in enumerate(texts)}
        forms = max(len(record["text"]) for record in images.records)
        self.captions = torch.tensor(
            [[self.numbers[r["text"][min(k, len(r["text"]) - 1)]] for k in range(forms)] for r in images.records]
        )  # (N, forms)


class UViTStage(Stage):
    """Options: data, where, image_size, autoencoder, encoders, captioner (folders), vae (sizes), uvit (UViTConfig fields),
    mix (see :mod:`.objective`), caption_shares (probability of each caption form), init (weights to start from)."""

    def __init__(self, config: TrainConfig):
        options = config.options
        self.out = Path(config.out)
        images = ImageFolder(options["data"], options["image_size"], {**options.get("where", {}), "split": "train"})
        self.size = len(images)
        self.latents = Latents(
            images, Path(options["autoencoder"]), Path(options["encoders"]), Path(options["captioner"]), options["vae"]
        )
        self.mix = options.get("mix", PAPER)
        forms = self.latents.captions.shape[1]
        self.shares = torch.tensor(options.get("caption_shares", [1.0] * forms))
        if len(self.shares) != forms:
            raise ValueError(f"caption_shares has {len(self.shares)} entries, but the pictures have {forms} captions each")
        with seeded_init(config.seed):
            self.model = UViT(UViTConfig(**options["uvit"]), attention=short_attention)
        if "init" in options:
            self.model.load_state_dict(torch.load(options["init"], weights_only=True))
        self.prompts = options.get("sample_prompts", [])

    def batch(self, indices: Tensor) -> dict[str, Tensor]:
        return {"index": indices}

    def loss(self, model: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
        index = batch["index"].cpu()
        data = self.latents
        form = torch.multinomial(self.shares, len(index), replacement=True, generator=generator)
        mean = data.mean[index]
        img = (mean + data.std[index] * torch.randn(mean.shape, generator=generator)) * SCALE
        text = data.text[data.captions[index].gather(1, form[:, None])[:, 0]]
        clean = Streams(img, data.clip_img[index], text).to(batch["index"].device)
        return diffusion_loss(model, clean, generator, mix=self.mix)

    def sample(self, model: nn.Module) -> Any:
        """Pictures of the sample prompts, 8 in a row, 20 steps at guidance 3."""
        from PIL import Image

        texts = [t for t in self.prompts if t in self.latents.numbers]
        if not texts:
            return None
        text = self.latents.text[[self.latents.numbers[t] for t in texts]]
        out = sample(
            model, NoisePath.text_to_image(20), Streams(text=text), guidance=3.0, generator=item_generators(0, len(texts))
        )
        pixels = self.latents.vae.decode(out.need("img") / SCALE)
        rows = [torch.cat(list(row), dim=2) for row in pixels.split(8) if len(row) == 8]
        if not rows:
            rows = [torch.cat(list(pixels), dim=2)]
        grid = torch.cat(rows, dim=1)
        return Image.fromarray(((grid.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())

    def export(self, model: nn.Module) -> None:
        torch.save(model.state_dict(), self.out / "uvit.pt")
        (self.out / "uvit.json").write_text(json.dumps(vars(model.config)), encoding="utf-8")
