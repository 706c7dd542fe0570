"""Run folders: how they are made, resumed, found and summarised."""
