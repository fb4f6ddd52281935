"""Evaluations of edits: manipulation along a direction, choice of settings, interpolation through time."""
