"""The baselines, on TRL's trainers; GRPO is KEPO with its two parts off."""
