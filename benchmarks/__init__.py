"""Measurements: each beside its floor and its peers, taken in the same run. See README.md."""
