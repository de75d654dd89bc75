"""Teaching a model a new thing: its word calls the picture *and* its picture calls the word, and the rest stays as it was.

Low-rank adapters (Hu et al., arXiv 2106.09685, by peft) on the network learn both directions at once from the one objective,
since that covers every pair of noise levels. The text latent of a new word comes from the frozen text encoder, so it is there
already; but the caption decoder has never written it and says the nearest words it knows. Adapters on the decoder teach it
the spelling. The rest is kept by pairs of the model's own (prior preservation, Ruiz et al., arXiv 2208.12242): on these,
network and decoder must answer as they did without adapters (Li and Hoiem, arXiv 1606.09282), which asks for less than
learning samples anew and costs no data.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from ..encoders.captions import CaptionDecoder
from ..media.images import contact_sheet, to_images
from ..path import NoisePath
from ..runtime.lora import Change, write_lora
from ..samplers import sample
from ..schedule import add_noise
from ..small.network import predicts_noise
from ..streams import MODALITY_OF, Streams, item_generators
from ..uvit import Block, UViT
from .lessons import NO_TOKEN, Lessons, caption_tokens, padded
from .objective import draw_labels, row_errors
from .sharding import is_sharded
from .stage import Batch, TrainingStage, seeded_init

DECODER_LAYERS = r".*\.(c_attn|c_proj|c_fc)"
"""The caption decoder's layers with adapters: every matrix of its blocks. Its `encode_prefix` makes the text latents that the
network was trained on."""
MIX: Mapping[str, float] = {"independent": 0.15, "clean_text": 0.55, "clean_image": 0.2, "equal": 0.1}
"""Where in the square of noise levels to learn: mostly on its two edges, and most where words become pictures, which is harder
to learn than the way back."""
KEPT_MIX: Mapping[str, float] = {"independent": 0.1, "clean_text": 0.4, "clean_image": 0.4, "equal": 0.1}
"""Where to keep: both directions alike."""
VELOCITY_LABELS: Mapping[str, Any] = {"lean": 0.6, "logit_normal": (0.0, 1.1)}
"""Labels for a network that predicts something else than noise (`sigma_data`), see :func:`.objective.draw_labels`: as the
bundled one saw them in its own training. Others see the paper's."""
CAPTION_NOISE = 0.8  # highest noise on a text latent before it is decoded: a sampled one is never exact
Output = tuple[Tensor, Tensor, Tensor]  # noise of img, clip_img, text


class Adapted(nn.Module):
    """A network, and a caption decoder or none, with adapters; both can still answer as they were.

    Raises:
        ValueError: peft is not installed.
    """

    def __init__(self, network: UViT, captioner: CaptionDecoder | None, rank: int, seed: int):
        super().__init__()
        try:
            from peft import LoraConfig, inject_adapter_in_model
            from peft.tuners.lora import LoraLayer
        except ImportError as error:
            raise ValueError("training a LoRA needs peft, which is not installed here: pip install peft") from error
        self.network = network.requires_grad_(False)
        self.captioner = None if captioner is None else captioner.requires_grad_(False)
        self.rank = rank
        with seeded_init(seed):
            for part, module in self.parts():
                layers = DECODER_LAYERS if part == "caption" else _matrices(module)
                config = LoraConfig(
                    r=rank, lora_alpha=rank, target_modules=layers, fan_in_fan_out=part == "caption"
                )  # alpha = rank: the change is up @ down and nothing else
                inject_adapter_in_model(config, module)
        self._adapters: list[Any] = [module for module in self.modules() if isinstance(module, LoraLayer)]

    def parts(self) -> list[tuple[str, nn.Module]]:
        """The modules with adapters by the part of the checkpoint that they are."""
        both = [("uvit", self.network), ("caption", self.captioner)]
        return [(name, module) for name, module in both if module is not None]

    def train(self, mode: bool = True) -> Adapted:
        """Stays as in use: GPT-2's dropout would have it answer differently from before by itself."""
        return super().train(False)

    @contextmanager
    def as_before(self) -> Iterator[None]:
        """Within this, adapters do nothing."""
        for layer in self._adapters:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._adapters:
                layer.enable_adapters(True)

    def forward(
        self, learned: int, noised: Streams, t_img: Tensor, t_text: Tensor, latents: Tensor, tokens: Tensor
    ) -> tuple[Output, Output, Tensor | None, Tensor | None]:
        """Predictions for a batch of learned pairs and, after them, kept ones; of the kept also those from before.

        Args:
            learned: how many of the B pairs are learned.
            noised: (B, ...) streams; t_img, t_text: (B,) their labels.
            latents: (B, L, d) noised text latents for the decoder; tokens: (B, T) what it should say.

        Returns:
            noise (B, ...) now, noise of the kept before, logits (B, T, V) now, those of the kept before; None without decoder.
        """
        with torch.no_grad(), self.as_before():
            old = noised.map(lambda x: x[learned:])
            before = self.network(old.img, old.clip_img, old.text, t_img[learned:], t_text[learned:])
            said_before = None if self.captioner is None else self.captioner(latents[learned:], tokens[learned:].clamp_min(0))
        now = self.network(noised.img, noised.clip_img, noised.text, t_img, t_text)
        said = None if self.captioner is None else self.captioner(latents, tokens.clamp_min(0))
        return now, before, said, said_before

    def changes(self) -> dict[str, dict[str, Change]]:
        """What the adapters have learned, by part and layer."""
        from peft.tuners.lora import LoraLayer

        def weight(matrices: Any) -> Tensor:
            (linear,) = matrices.values()
            matrix: Tensor = linear.weight
            return matrix.detach().float().cpu().clone()

        return {
            part: {
                name: Change(weight(layer.lora_A), weight(layer.lora_B))
                for name, layer in module.named_modules()
                if isinstance(layer, LoraLayer)
            }
            for part, module in self.parts()
        }


class LoraStage(TrainingStage):
    """Adapters on a model, for the training loop.

    Args:
        model: network and caption decoder with fresh adapters.
        lessons: what to learn and what to keep.
        out: the file to write.
        keep: weight of keeping against learning.
        kept_each: pairs to keep in a batch for each one to learn.
        mix: shares of the timestep mix of what is learned, see :func:`.objective.draw_labels`.
        decode: image latents (B, C, h, w) -> pixels (B, 3, H, W) in [-1, 1], for the samples; without it there are none.
        about: what the file tells about itself besides its words.
    """

    blocks = (Block,)

    def __init__(
        self,
        model: Adapted,
        lessons: Lessons,
        out: Path,
        *,
        keep: float = 2.0,
        kept_each: int = 1,
        mix: Mapping[str, float] = MIX,
        decode: Callable[[Tensor], Tensor] | None = None,
        about: Mapping[str, Any] | None = None,
    ):
        self.model: Adapted = model
        self.lessons, self.out, self.keep, self.kept_each, self.mix = lessons, out, keep, kept_each, mix
        self.velocity = not predicts_noise(model.network.config)
        self.decode = decode
        self.about = dict(about or {})
        self.size = len(lessons.words)
        if model.captioner is None:
            self.tokens = torch.full((self.size + lessons.kept.batch, 1), NO_TOKEN)
        else:
            if lessons.kept_tokens is None:
                raise ValueError("a caption decoder that learns needs what it says of the kept pairs: lessons.said_of")
            rows = [*caption_tokens(model.captioner, lessons.words).tolist(), *lessons.kept_tokens.tolist()]
            self.tokens = padded(rows)

    def fingerprint(self) -> str:
        return f"{self.lessons.fingerprint()} rank {self.model.rank} keep {self.keep} x {self.kept_each}"

    def examples(self, indices: Tensor, seeds: Sequence[int]) -> Batch:
        """Each learned pair with k pairs to keep, (B, 1 + k, ...), and the labels and noise of all of them."""
        learned = {name: stream[indices] for name, stream in self.lessons.learned.items()} | {"tokens": self.tokens[indices]}
        drawn = [self._draw(torch.Generator().manual_seed(seed)) for seed in seeds]
        rows = torch.stack([rows for rows, _ in drawn])  # (n, k)
        kept = {name: stream[rows] for name, stream in self.lessons.kept.items()}
        kept["tokens"] = self.tokens[self.size + rows]
        pairs = {name: torch.cat([value[:, None], kept[name]], dim=1) for name, value in learned.items()}
        return pairs | {name: torch.stack([draw[name] for _, draw in drawn]) for name in drawn[0][1]}

    def _draw(self, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        count = 1 + self.kept_each
        rows = torch.randint(self.lessons.kept.batch, (self.kept_each,), generator=generator)
        mixes = ((1, self.mix), (self.kept_each, KEPT_MIX))
        options = VELOCITY_LABELS if self.velocity else {}
        drawn = [draw_labels(size, mix, generator, **options) for size, mix in mixes]
        labels = {name: torch.cat([part[name] for part in drawn]) for name in drawn[0]}
        noise = {
            f"noise_{name}": torch.randn(count, *stream.shape[1:], generator=generator)
            for name, stream in self.lessons.learned.items()
        }
        text = self.lessons.learned.need("text")
        level = CAPTION_NOISE * torch.rand(count, 1, 1, generator=generator)
        caption = level * torch.randn(count, *text.shape[1:], generator=generator)
        return rows, {"t_img": labels["img"], "t_text": labels["text"], "caption_noise": caption} | noise

    def loss(self, model: Any, batch: Batch, generator: torch.Generator) -> dict[str, Tensor]:
        count = len(batch["t_img"])
        both = {name: value.transpose(0, 1).flatten(0, 1) for name, value in batch.items()}  # (n, 1 + k, ...) -> (n + nk, ...)
        labels = {"img": both["t_img"], "text": both["t_text"]}
        names = [name for name, _ in self.lessons.learned.items()]
        noised = Streams(**{n: add_noise(both[n], both[f"noise_{n}"], labels[MODALITY_OF[n]].float()) for n in names})
        now, before, said, said_before = model(
            count, noised, labels["img"], labels["text"], both["text"] + both["caption_noise"], both["tokens"]
        )
        targets = [torch.cat([both[f"noise_{n}"][:count], old.float()]) for n, old in zip(names, before, strict=True)]
        rows = [row_errors(n, x, y, labels, self.velocity) for n, x, y in zip(names, now, targets, strict=True)]
        errors, elements = (torch.stack(values).sum(0) for values in zip(*rows, strict=True))
        error = errors / elements  # (n + nk,), as in the objective that made the network
        terms = {"learn": error[:count].mean(), "keep": error[count:].mean()}
        if said is not None and said_before is not None:
            terms["spell"] = F.cross_entropy(
                said[:count].float().flatten(0, 1), both["tokens"][:count].flatten(), ignore_index=NO_TOKEN
            )
            terms["keep_words"] = _divergence(said_before, said[count:], both["tokens"][count:] != NO_TOKEN)
        kept = sum(value for name, value in terms.items() if name.startswith("keep"))
        loss = terms["learn"] + terms.get("spell", 0) + self.keep * kept
        return {"loss": loss, **{name: value.detach() for name, value in terms.items()}}

    def sample(self, model: Any) -> Image.Image | None:
        """Pictures of the first captions, and below the captions of as many learned pictures: where both directions stand."""
        if self.decode is None or is_sharded(self.model):  # a part of a sharded model cannot run by itself
            return None
        words = list(dict.fromkeys(self.lessons.words))
        words = [words[k % len(words)] for k in range(4)]
        rows = torch.tensor([self.lessons.words.index(word) for word in words])
        rows = (rows + torch.arange(4) * max(1, self.size // 4)) % self.size if len(set(words)) == 1 else rows
        device = next(self.model.network.parameters()).device
        shown = self.lessons.learned.map(lambda x: x[rows].to(device))
        text = torch.cat([self.lessons.learned.need("text")[self.lessons.words.index(word)][None] for word in words])
        settings: dict[str, Any] = {"guidance": 3.0, "generator": item_generators(0, 4)}
        network = self.model.network
        drawn = sample(network, NoisePath.text_to_image(10), Streams(text=text.to(device)), **settings)
        pixels = torch.cat([self.decode(x).cpu() for x in (drawn.need("img"), shown.need("img"))])
        said = [""] * 4
        if self.model.captioner is not None:
            settings["generator"] = item_generators(0, 4)
            read = sample(network, NoisePath.image_to_text(10), shown.replace(text=None), **settings)
            said = [found[0].text for found in self.model.captioner.decode(read.need("text"), beams=3)]
        return contact_sheet(to_images(pixels), [*(f'"{word}"' for word in words), *(f"= {text}" for text in said)], 4)

    def export(self, model: Any) -> None:
        """The LoRA file."""
        words = list(dict.fromkeys(self.lessons.words))
        write_lora(self.out, model.changes(), {"words": words, "rank": self.model.rank, **self.about})


def _matrices(network: nn.Module) -> list[str]:
    """Names of a network's linear layers and convolutions: those that read and draw latents have to learn too. With the
    matrices of the transformer's blocks alone, the bundled network drew a new thing with hardly an outline."""
    return [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def _divergence(before: Tensor, now: Tensor, counts: Tensor) -> Tensor:
    """Kullback-Leibler divergence of next tokens, before (B, T, V) from now, mean over the places that count (B, T)."""
    old, new = before.float().log_softmax(-1), now.float().log_softmax(-1)
    return ((old.exp() * (old - new)).sum(-1) * counts).sum() / counts.sum()
