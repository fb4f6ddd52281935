"""Fault injection on real processes. `make test-faults` runs it at length; tests/test_faults.py runs a short form."""
