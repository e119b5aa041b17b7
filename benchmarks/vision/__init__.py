"""Vision layers and their published models, by fbila's kernels and by the official operations."""
