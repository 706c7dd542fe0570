"""What is asked: rows, their sources, splits and samples."""
