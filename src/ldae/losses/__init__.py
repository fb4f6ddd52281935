"""Losses of the three stages. Noise and timesteps are arguments: a loss draws nothing itself."""
