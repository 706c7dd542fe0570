"""The paper's task, lettered multiple choice: its prompts (Appendix C), its rewards (Appendix B), its data set."""
