"""Fault injection on real processes: `python -m tests.faults`, `make test-faults`; a short version in test_faults.py."""
