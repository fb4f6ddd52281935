"""Scans as data: the table, the split by subject, one transform, the cache of volumes, the sample stream."""
