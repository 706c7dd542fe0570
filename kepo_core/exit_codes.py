"""How ``kepo`` ends: completed; failed, and the folder says why; refused, and nothing is left behind; interrupted."""

COMPLETED, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130
