"""What readers see: figures, cards, reports, the index."""
