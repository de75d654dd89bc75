"""Tasks beyond plain generation: editing pictures, captions with candidates and scores, and the inputs of all tasks."""
