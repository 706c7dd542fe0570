"""The paper, section by section: prompts, rewards, objective, exploration, teacher, trainer."""
