"""The experiment, one run of it: models, training, evaluation, progress."""
