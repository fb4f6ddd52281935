"""Evaluations of images: reconstruction, variation, generation, and whether the decoder uses y."""
