"""Studies of the bundled model: what the paper claims, what acceleration costs, what a LoRA learns. Each is a command."""
