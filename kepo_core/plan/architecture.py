"""The sizes of a model that memory depends on, from its configuration: no weights are loaded or created.

Parameters are counted on a model of meta tensors (shapes without contents), which works for any architecture.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from kepo_core.errors import ParamError
from kepo_core.experiment.models import read_config, resolve

#: Configurations of two of the paper's models, for machines that cannot reach the hub.
SHIPPED = Path(__file__).parent / "shapes"


@dataclass(frozen=True)
class Architecture:
    """Sizes of an image-text model.

    Attributes:
        language: parameters of the decoder, its embedding included.
        vision: parameters of everything except decoder and head.
        head: parameters of the output embedding; 0 if it is tied to the input embedding.
        linear: parameters of the linear layers' matrices, without the head; bitsandbytes quantises these.
        adapted: inputs plus outputs of all linear layers of the decoder; LoRA of rank r has r times as many parameters.
        vocabulary, hidden, layers, heads, kv_heads, head_size, mlp: of the language model.
        vision_hidden, vision_layers, vision_heads, vision_mlp, mergers: of the vision tower.
        patch, merge: side of a patch in pixels, and of a token in patches.
        pixels: how many numbers a patch has.
    """

    language: int
    vision: int
    head: int
    linear: int
    adapted: int
    vocabulary: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vision_hidden: int
    vision_layers: int
    vision_heads: int
    vision_mlp: int
    mergers: int
    patch: int
    merge: int
    pixels: int

    @property
    def parameters(self) -> int:
        """All parameters, each counted once."""
        return self.language + self.vision + self.head

    @property
    def queries(self) -> int:
        """Q, the total size of all query heads."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """K, the total size of all key heads."""
        return self.kv_heads * self.head_size

    @property
    def layer(self) -> float:
        """Parameters of one decoder layer."""
        return (self.language - self.vocabulary * self.hidden) / self.layers


def load_config(name: str, parameter: str = "student") -> tuple[Any, str]:
    """The configuration of a model by embedded name, folder or hub name, and its origin in words.

    A hub name is looked up in this machine's cache, then among this package's shapes, then on the hub.

    Raises:
        ParamError: the configuration does not exist or cannot be fetched.
    """
    source = resolve(name, parameter)
    if Path(source).is_dir():
        return read_config(name, parameter), "its folder"
    try:
        return AutoConfig.from_pretrained(source, local_files_only=True), "the hub's cache on this machine"
    except (OSError, ValueError):
        shipped = SHIPPED / f"{source.rpartition('/')[2]}.json"
    if source.startswith("Qwen/") and shipped.is_file():
        return AutoConfig.from_pretrained(shipped), "this package's shapes (not in the hub's cache on this machine)"
    try:
        return AutoConfig.from_pretrained(source), "the hub"
    except (OSError, ValueError) as error:
        raise ParamError(
            f"{parameter} is {name!r}, whose configuration is not on this machine and cannot be fetched: name a folder "
            "with its config.json (a plan needs no weights)"
        ) from error


def architecture(config: Any) -> Architecture:
    """Sizes of the image-text model that ``config`` describes.

    Raises:
        ParamError: the model takes no images.
    """
    if getattr(config, "vision_config", None) is None:
        raise ParamError(f"a model of type {config.model_type} takes no images, expected an image-text model")
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    text, vision = config.get_text_config(), config.vision_config
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    inside = {id(p) for p in decoder.parameters()}
    everything = {id(p): p.numel() for p in model.parameters()}
    head_only = 0 if config.tie_word_embeddings else head.weight.numel()
    language = sum(p.numel() for p in decoder.parameters())
    tied_twice = head.weight.numel() if config.tie_word_embeddings and id(head.weight) not in inside else 0
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    depth = getattr(vision, "depth", None) or vision.num_hidden_layers
    return Architecture(
        language=language,
        vision=sum(everything.values()) - language - head_only - tied_twice,
        head=head_only,
        linear=sum(m.weight.numel() for m in linear),
        adapted=sum(m.in_features + m.out_features for m in decoder.modules() if isinstance(m, nn.Linear)),
        vocabulary=text.vocab_size,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_size=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        mlp=text.intermediate_size,
        vision_hidden=vision.hidden_size,
        vision_layers=depth,
        vision_heads=getattr(vision, "num_heads", None) or vision.num_attention_heads,
        vision_mlp=vision.intermediate_size,
        mergers=1 + len(getattr(vision, "deepstack_visual_indexes", ())),
        patch=vision.patch_size,
        merge=getattr(vision, "spatial_merge_size", 1),
        pixels=3 * vision.patch_size**2 * getattr(vision, "temporal_patch_size", 1),
    )
