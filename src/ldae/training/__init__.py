"""The loop, and what it needs: checkpoints, EMA, tracking."""
