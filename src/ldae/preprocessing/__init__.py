"""Preprocessing of raw scans: bias field, brain extraction, registration, resampling, intensity and quality control."""
