"""One scan from a NIfTI file to a model volume and back."""
