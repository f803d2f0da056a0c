"""Use cases, one a file; the only layer that mixes core, storage and wire."""
