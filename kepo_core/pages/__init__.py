"""What readers see: figures, captions, cards, reports, the index."""
