"""What users hold: the pool, its sessions and references, awaited or blocking."""
