"""Measurements. Each prints what it compares with, taken in the same run, and writes JSON."""
