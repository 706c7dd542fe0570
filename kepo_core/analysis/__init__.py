"""From the records of runs to tables, estimates with intervals, and verdicts."""
