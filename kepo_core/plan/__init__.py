"""The GPU memory that a run needs; only ``kepo plan`` imports this package."""
