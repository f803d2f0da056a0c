"""Deterministic simulation of synchronising: clients, a server and gc in one process.

The product's own code runs on a seeded scheduler with simulated time, disks and network; the same
seed gives the same event logs, byte for byte. `python -m tools.simulation SEED --trace` shows one.
"""
