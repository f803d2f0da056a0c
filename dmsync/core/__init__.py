"""Pure values and algorithms: no I/O, no clock, no randomness. Implements protocol/OBJECTS.md."""
