"""The parts of a restore: writing files, metadata, new names, finishing directories, durability."""
