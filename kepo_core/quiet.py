"""Silences output of other libraries that no reader of a notebook can act on. Imported before anything heavy."""

import logging as python_logging
import os
import warnings


def quiet_third_parties() -> None:
    """Turn off bars for loading a file, advice to install widgets, and warnings about how TRL calls transformers."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else a line about forking after each use
    warnings.filterwarnings("ignore", message="IProgress not found")
    warnings.filterwarnings("ignore", message="TRL currently supports vLLM")  # `launch.check` checks our range
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
    # An 8-bit layer warns at each call that it computes in 16 bits, and an import that a faster kernel is missing.
    for name in ("autograd._functions", "backends.cpu.ops"):
        python_logging.getLogger(f"bitsandbytes.{name}").setLevel(python_logging.ERROR)
    python_logging.getLogger("transformers.processing_utils").addFilter(_is_not_about_kwargs)  # TRL's, of its templates
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]


def _is_not_about_kwargs(record: python_logging.LogRecord) -> bool:
    return "processor_kwargs" not in record.getMessage()
