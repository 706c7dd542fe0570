"""Records of runs → tables, estimates with intervals, verdicts."""
