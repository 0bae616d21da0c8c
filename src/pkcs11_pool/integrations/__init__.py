"""What users already have, on top of a pool: each an extra of its own."""
