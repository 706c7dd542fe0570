"""The paper's task: lettered multiple choice over one picture, with its prompts (Appendix C) and rewards (Appendix B)."""
