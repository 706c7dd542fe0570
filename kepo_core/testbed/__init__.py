"""The small world that ships: its models, how they are made, and whether it is fair."""
