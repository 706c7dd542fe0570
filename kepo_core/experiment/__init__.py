"""One run of the experiment: models, training, evaluation, progress."""
