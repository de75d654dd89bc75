"""What only small networks have; published checkpoints have none of it."""
