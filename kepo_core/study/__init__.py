"""The experiment, one run of it: models, training, evaluation, progress; and what it will take."""
