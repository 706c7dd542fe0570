"""What a run would take on a GPU; the command alone imports it."""
