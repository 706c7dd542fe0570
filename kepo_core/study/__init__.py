"""The experiment: models, evaluation, statistics, run folders, figures, reports."""
