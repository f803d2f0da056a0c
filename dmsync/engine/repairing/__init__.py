"""Healing a damaged store (protocol/decisions/0012-repair.md): what is harmed is set aside, never
deleted, and what takes its place is verified by hash.

- `event_log`: format and log, before the store can be opened;
- `losses`: what could not be put back, until somebody accepts it;
- `packs`: sound records of harmed packs go into a new one;
- `sources`: objects that are elsewhere on this machine;
- `from_remote`: objects that a remote has;
- `repair`: all of it in order.
"""
