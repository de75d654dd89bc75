"""Train UniDiffuser LoRA: trains a LoRA of the network and of the caption decoder on a few images."""

from __future__ import annotations

from typing import Any

import comfy.utils
from comfy_api.latest import io
from torch import Tensor

from .nodes_lora import on_captions, on_model
from .shared_inputs import seed_input
from .train_on_host import as_image, squares, train
from .types import CATEGORY, CaptionDecoderType


class TrainUniDiffuserLora(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        def whole(name: str, default: int, most: int, tooltip: str) -> io.Int.Input:
            return io.Int.Input(name, default=default, min=1, max=most, tooltip=tooltip)

        return io.Schema(
            node_id="UniDiffuserTrainLora",
            display_name="Train UniDiffuser LoRA",
            category=CATEGORY,
            description="Trains a LoRA on 4 to 8 images of a new subject. Afterwards its word generates the subject, and "
            "images of the subject are captioned with the word. Queue an interrupted run again to continue it. The bundled "
            "model takes minutes on a CPU.",
            search_aliases=["lora", "train", "fine-tune", "dreambooth", "concept", "subject"],
            is_input_list=True,
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="From Load UniDiffuser. LoRAs already applied are kept."),
                io.Clip.Input("clip", tooltip="From Load UniDiffuser."),
                io.Vae.Input("vae", tooltip="From Load UniDiffuser."),
                io.ClipVision.Input("clip_vision", tooltip="From Load UniDiffuser."),
                CaptionDecoderType.Input("caption_decoder", tooltip="From Load UniDiffuser. It learns to write the word."),
                io.Image.Input(
                    "images", tooltip="4 to 8 images of the subject, a batch or a list, of any size. The centre square is used."
                ),
                io.String.Input(
                    "captions",
                    multiline=True,
                    default="zorbi",
                    tooltip="One line per image, or one for all. Name the subject with a word the model does not know, such "
                    "as zorbi.",
                ),
                io.String.Input(
                    "name", default="zorbi", tooltip="Name of the file in models/loras. A number is added if it exists."
                ),
                whole(
                    "steps",
                    800,
                    100_000,
                    "Training steps. 800 suit the bundled model; use more if the subject is not recognisable.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.002,
                    min=1e-6,
                    max=0.1,
                    step=1e-4,
                    tooltip="0.002 suits the bundled model, 0.0001 the 1 B model.",
                ),
                whole("batch_size", 8, 256, "New pairs per step, plus as many kept pairs. Lower it if memory runs out."),
                whole("rank", 32, 256, "Size of the LoRA. 32 is usual; a higher rank learns more detail and forgets more."),
                whole(
                    "kept_pairs",
                    320,
                    4096,
                    "Image-caption pairs that the model generates first, to keep what it knows. More is safer and slower.",
                ),
                whole("variations", 4, 64, "Copies of each image, slightly turned and moved on white. Use 1 for photographs."),
                whole("preview_every", 50, 10_000, "Steps between preview samples."),
                seed_input("Random seed. The same seed and settings give the same LoRA."),
            ],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="The model with the LoRA applied."),
                CaptionDecoderType.Output(display_name="CAPTION_DECODER", tooltip="The caption decoder with the LoRA applied."),
                io.String.Output(display_name="lora_name", tooltip="The file in models/loras, for Load UniDiffuser LoRA."),
                io.Image.Output(
                    display_name="loss_plot", tooltip="Losses of the new and the kept pairs, step by step. Lower is better."
                ),
                io.Image.Output(
                    display_name="samples", tooltip="The last preview: images from the captions, and captions of the images."
                ),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, images: list[Tensor], captions: list[str], **inputs: list[Any]) -> io.NodeOutput:
        one = {name: values[0] for name, values in inputs.items()}
        model, decoder = one["model"], one["caption_decoder"]
        bar = comfy.utils.ProgressBar(1, node_id=cls.hidden.unique_id)
        path, plot, sample = train(squares(images, decoder), captions, bar=bar, **one)
        return io.NodeOutput(
            on_model(model, str(path), 1.0), on_captions(decoder, str(path), 1.0), path.name, as_image(plot), as_image(sample)
        )


NODES = [TrainUniDiffuserLora]
