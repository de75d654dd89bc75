"""Pictures and words to latents and back: CLIP, the autoencoder, the caption decoder."""
