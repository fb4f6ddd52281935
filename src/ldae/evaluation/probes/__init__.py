"""Linear probes on y_sem, their baselines and intervals."""
