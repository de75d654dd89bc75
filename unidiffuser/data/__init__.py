"""From metadata to latent shards: filtering of LAION-style tables, reading of downloaded pictures, encoding."""
