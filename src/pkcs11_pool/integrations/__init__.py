"""What users already sign with, on keys of the pool: each an extra of its own."""
