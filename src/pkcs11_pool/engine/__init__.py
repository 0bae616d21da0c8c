"""Which job runs when, in which session, on which thread. Knows no event loop."""
