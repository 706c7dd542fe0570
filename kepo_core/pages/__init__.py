"""Output for readers: figures, rollout cards, reports, the index."""
