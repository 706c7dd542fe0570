"""Load student, teacher and processor, by embedded name, folder or hub name, and check that they fit together.

Weights must be safetensors, and no remote code is run. Trained weights are float32 at any compute precision (AdamW's
steps vanish in the rounding of pure bf16 weights); a teacher is not trained, so it has the compute precision.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    BitsAndBytesConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import BITSANDBYTES_MIN_VERSION, is_bitsandbytes_available

from kepo_core import paths
from kepo_core.errors import ParamError
from kepo_core.method.processor import image_only_processor

#: The shipped weights.
EMBEDDED_DIR = Path(__file__).parents[1] / "embedded"
EMBEDDED = {"embedded:student": EMBEDDED_DIR / "student", "embedded:teacher": EMBEDDED_DIR / "teacher"}


def best_device() -> torch.device:
    """The CUDA device of this process if it has one, otherwise the CPU.

    If processes shard a model (FSDP, ZeRO), each takes its part from the CPU when training begins.
    """
    shared_out = any(os.environ.get(f"ACCELERATE_USE_{way}") == "true" for way in ("FSDP", "DEEPSPEED"))
    if shared_out or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def resolve(name: str, parameter: str) -> str:
    """The folder or hub name of the model ``name``.

    Raises:
        ParamError: an unknown embedded name, or a path that is not a folder.
    """
    if name.startswith("embedded:"):
        if name not in EMBEDDED:
            raise ParamError(f"{parameter} is {name!r}, expected one of {', '.join(EMBEDDED)}")
        return str(EMBEDDED[name])
    path = paths.resolve(name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ParamError(f"{parameter} is the folder {name!r}, which has no config.json, expected a saved model")
        return str(path)
    if name.startswith(("/", ".", "~")) or name.count("/") != 1:
        raise ParamError(f"{parameter} is {name!r}, expected an existing folder or a hub name like owner/model")
    return name


def read_config(name: str, parameter: str = "student") -> Any:
    """The configuration of a model by embedded name, folder or hub name.

    Raises:
        ParamError: the configuration is broken, of an unknown model type, or cannot be downloaded.
    """
    source = resolve(name, parameter)
    with _reading(name, parameter, "config.json"):
        return AutoConfig.from_pretrained(source)


@contextmanager
def _reading(name: str, parameter: str, what: str) -> Iterator[None]:
    """Turn any error that libraries raise for a model's files into a `ParamError`.

    A broken tokenizer file raises a bare ``Exception``.
    """
    try:
        yield
    except (ParamError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise ParamError(f"{parameter} is {name!r}, whose {what} cannot be read: {reason}") from error


def load_processor(name: str, parameter: str = "student") -> Any:
    """The processor of a model, with left padding.

    Without a working torchvision a Qwen checkpoint gets `method.processor.ImageOnlyQwenProcessor`, made from the same
    files, because ``AutoProcessor`` would silently return a bare tokenizer.
    """
    source, config = resolve(name, parameter), read_config(name, parameter)
    with _reading(name, parameter, "processor"):
        processor: Any = image_only_processor(config.model_type, source)
        if processor is None:
            processor = AutoProcessor.from_pretrained(source)
    if not isinstance(processor, ProcessorMixin) or getattr(processor, "image_processor", None) is None:
        raise ParamError(f"{parameter} is {name!r}, whose processor takes no images: expected an image-text model")
    marks = [getattr(part, "image_token_id", None) for part in (config, processor)]
    if None not in marks and marks[0] != marks[1]:
        raise ParamError(
            f"{parameter} is {name!r}, whose config.json has image_token_id {marks[0]} and whose processor {marks[1]}, "
            "expected the same one: the model would not find its pictures"
        )
    if not processor.chat_template:
        raise ParamError(f"{parameter} is {name!r}, which has no chat template: expected an instruction-tuned model")
    with _reading(name, parameter, "chat template"):
        question = [{"type": "image"}, {"type": "text", "text": "Where does the finding lie?"}]
        processor.apply_chat_template([{"role": "user", "content": question}], tokenize=False)
    processor.tokenizer.padding_side = "left"
    return processor


def check_quantizes(quantization: str) -> None:
    """Refuse a quantised teacher if bitsandbytes is missing, before anything is loaded.

    Raises:
        ParamError: says what to install or set.
    """
    if quantization != "none" and not is_bitsandbytes_available():
        raise ParamError(
            f"teacher_quantization is {quantization!r}, which needs bitsandbytes {BITSANDBYTES_MIN_VERSION} or newer: "
            "install it (pip install -U bitsandbytes), or set teacher_quantization to none"
        )


def quantization_config(quantization: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Transformers' configuration: int8 with outliers in 16 bits, or 4-bit normal floats that compute in ``dtype``.

    Neither quantises the output embedding, whose weight the divergence reads.
    """
    if quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    if quantization == "4bit":
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=True,
        )
    return None


def load_model(
    name: str,
    parameter: str = "student",
    *,
    trained: bool = True,
    precision: str = "fp32",
    quantization: str = "none",
    only_looked_at: bool = False,
) -> PreTrainedModel:
    """The model in evaluation mode on the best device.

    ``trained=False`` (a teacher, or the base of adapters) freezes the model and loads its weights in ``precision``,
    those of its linear layers quantised by ``quantization``; otherwise they are float32. ``only_looked_at``: weights
    are checked, not loaded (they are on torch's meta device).

    Raises:
        ParamError: weights are missing or have another shape.
    """
    dtype = torch.bfloat16 if precision == "bf16" and not trained else torch.float32
    place: dict[str, int | str] | None = None
    if quantization != "none":  # bitsandbytes loads it there; by default every process would use the first GPU
        place = {"": int(os.environ.get("LOCAL_RANK", "0")) if torch.cuda.is_available() else "cpu"}
    source = resolve(name, parameter)
    with _reading(name, parameter, "weights"):
        loaded: tuple[PreTrainedModel, dict[str, set[str]]] = AutoModelForImageTextToText.from_pretrained(
            source,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            quantization_config=quantization_config(quantization, dtype),
            device_map={"": "meta"} if only_looked_at else place,
            output_loading_info=True,
        )
    model, told = loaded
    if missing := sorted(told["missing_keys"]):  # transformers would initialise them at random, with a warning
        raise ParamError(
            f"{parameter} is {name!r}, whose weights lack {len(missing)} tensors, for example {missing[0]}: expected a "
            "whole checkpoint"
        )
    model.requires_grad_(trained)
    if only_looked_at or getattr(model, "is_quantized", False):  # it is on its device and cannot be moved
        return model.eval()
    return model.to(best_device()).eval()  # type: ignore[arg-type]


def check_same_vocabulary(student: Any, teacher: Any) -> None:
    """Refuse a teacher whose token ids have other texts than the student's; arguments are both processors.

    Raises:
        ParamError: the vocabularies differ; the message names the first differing token.
    """
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    if ours == theirs:
        return
    different = sorted(t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t))
    raise ParamError(
        f"teacher has another vocabulary than student ({len(theirs)} and {len(ours)} tokens, {len(different)} differ, "
        f"the first is {different[0]!r}): token distributions cannot be compared; choose a teacher of the same family"
    )


def save_embedded(model: PreTrainedModel, processor: Any, folder: Path) -> None:
    """Write a model (as float16 safetensors) and its processor so that :func:`load_model` reads them."""
    half = model.to(torch.float16)  # type: ignore[arg-type]
    half.save_pretrained(folder)
    processor.tokenizer.chat_template = processor.chat_template
    processor.tokenizer.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)
