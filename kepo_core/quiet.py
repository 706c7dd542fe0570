"""Hushes what other libraries print and no reader of a notebook can act on. Imported before anything heavy."""

import os
import warnings


def quiet_third_parties() -> None:
    """No bars for loading a file, no advice to install widgets, no warnings about how TRL calls transformers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a line about forking after each use
    warnings.filterwarnings("ignore", message="IProgress not found")
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
