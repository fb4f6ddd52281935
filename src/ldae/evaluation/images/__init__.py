"""How well scans are reconstructed, varied and generated."""
