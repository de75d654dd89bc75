"""From tables of links to latent shards: filter LAION-style tables, read captioned pictures, encode them."""
