"""The small world that ships: its models, how they are made, and how close they are to the paper's."""
