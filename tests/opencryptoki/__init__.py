"""What runs beside an opencryptoki of its own: see `tests/test_opencryptoki.py`."""
