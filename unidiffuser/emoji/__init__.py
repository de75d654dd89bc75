"""How the bundled model is made and judged; nothing else in the package imports this."""
