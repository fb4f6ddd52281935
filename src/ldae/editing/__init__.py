"""Edits of a scan through y: directions, the editor, and the probes that read the result."""
