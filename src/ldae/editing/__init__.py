"""Edits of scans along directions in y, and the linear probes that directions and their names come from."""
