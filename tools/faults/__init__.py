"""Faults, each tried on the real program: cuts, kills, errors, flips, races, hostile peers.

`tools/scorecard` runs them all and prints one table; `python -m tools.faults NAME` runs one.
"""
