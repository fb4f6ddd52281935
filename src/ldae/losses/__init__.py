"""Losses; they take noise and timestep as arguments and draw nothing themselves."""
