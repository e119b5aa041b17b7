"""Whole models of other libraries, with their own attention and with fbila's in its place."""
