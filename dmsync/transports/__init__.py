"""Ordered byte streams between clusters: asyncssh, an ssh command, pipes. Bytes only."""
