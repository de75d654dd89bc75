"""How a model runs: number formats, fewer evaluations, LoRA."""
