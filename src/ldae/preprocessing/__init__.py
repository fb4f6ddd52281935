"""Raw scans in, a table out: bias field, brain extraction, registration, resampling, intensity, and quality control."""
