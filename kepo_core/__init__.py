"""KEPO: quality-gated on-policy distillation and knowledge-enhanced exploration (arXiv 2602.00400), as a study."""
