"""The method, for any task: objective, exploration, teacher, trainer."""
