"""The command `dm`."""
