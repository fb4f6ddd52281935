"""What edits do to a scan: manipulation, counterfactuals, interpolation."""
