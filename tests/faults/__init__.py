"""Fault injection on real processes: `python -m tests.faults` or `make test-faults`; in short in test_faults.py."""
