"""The three stages. Open these to understand the method."""
