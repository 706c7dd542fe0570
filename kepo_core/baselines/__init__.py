"""What KEPO is compared with, on TRL's trainers; GRPO is KEPO with its two parts off."""
