"""Measurements: what this project costs beside its peers, and what it is compared to."""
