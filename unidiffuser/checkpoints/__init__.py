"""Checkpoints: reading of three layouts, writing of one safetensors file."""

from .checkpoint import Checkpoint, convert, load_checkpoint, save_checkpoint
from .config import CaptionConfig, ModelConfig, VAEConfig

__all__ = ["CaptionConfig", "Checkpoint", "ModelConfig", "VAEConfig", "convert", "load_checkpoint", "save_checkpoint"]
