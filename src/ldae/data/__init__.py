"""Data: the table of scans, the split by subject, the transform to model space, caches, latents and batches."""
