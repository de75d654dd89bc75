"""Encoders and decoders of latents: CLIP, the autoencoder, the caption decoder."""
