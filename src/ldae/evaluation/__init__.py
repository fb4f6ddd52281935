"""What a trained model is worth: embeddings, probes, reconstruction, semantics, generation, and their report."""
