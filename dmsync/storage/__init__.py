"""Packs, index, event log and its projections, locks: synchronous, no network."""
