"""The memory of a training step on one GPU, in bytes: one pure function per item, each with its formula.

Notation: H hidden size, M mlp, Q and K the total sizes of query and key heads, V vocabulary, L layers, n tokens, S the
longest sequence, P parameters; c bytes per number in computations (4, or 2 under bf16), r bytes per number in the
states between layers (4 with float32 master weights; c under LoRA, whose base weights are kept in c).
Every row counts with its own prompt: a run needs less if the rows of a group share one (`method.shared_prompts`,
`method.shared_scoring`). Numbers for layers were counted on Qwen3-VL (PyTorch keeps exactly these bytes); other
families differ somewhat.
"""

from dataclasses import dataclass

from kepo_core.plan.architecture import Architecture

#: (trained weights, c) → bytes that a decoder layer keeps per token for the backward pass, per unit of H, M, Q and K.
_LAYER = {
    ("all", 4): (24, 16, 24, 8),
    ("all", 2): (26, 8, 14, 6),
    ("lora", 4): (16, 16, 20, 4),
    ("lora", 2): (18, 8, 14, 4),
}
#: c → the same for a layer of the vision tower, per patch, per unit of its hidden size and mlp.
_VISION_LAYER = {4: (44, 8), 2: (22, 4)}
#: Maximum tile of TRL's kernels: tokens × entries of the vocabulary.
TILE_TOKENS, TILE_WORDS = 4096, 32768
#: Maximum rows in one forward pass of the teacher (``Teacher.batch_size``).
TEACHER_ROWS = 64
#: Bytes per weight of a quantised linear layer, scales included (4 bits: NF4 with double quantisation).
QUANTIZED = {"8bit": 1.0, "4bit": 0.516}


@dataclass(frozen=True)
class Batch:
    """Batch sizes of one process.

    Attributes:
        rows: sequences in one forward pass, prompts × G.
        windows: forward passes per optimiser step; ``windows`` × ``rows`` completions are generated at once.
        prompt: tokens of the longest prompt, its picture included.
        completion: tokens of the longest completion.
        patches: patches of a row's picture.
        compute: c.
        lora_rank: rank of the adapters; 0 if all weights are trained.
        checkpointing: whether layers keep only their inputs (activation checkpointing).
    """

    rows: int
    windows: int
    prompt: int
    completion: int
    patches: int
    compute: int
    lora_rank: int
    checkpointing: bool

    @property
    def length(self) -> int:
        """S, tokens of prompt and completion."""
        return self.prompt + self.completion

    @property
    def residual(self) -> int:
        """r, bytes per number in the states between layers."""
        return self.compute if self.lora_rank else 4


def trained(a: Architecture, batch: Batch) -> int:
    """Parameters with a gradient: P, or under LoRA rank × (inputs + outputs of the decoder's linear layers)."""
    return batch.lora_rank * a.adapted if batch.lora_rank else a.parameters


def student_weights(a: Architecture, batch: Batch) -> int:
    """4 P (float32 master weights); under LoRA c P for the base weights and 4 bytes per adapter weight."""
    own = a.parameters * (batch.compute if batch.lora_rank else 4)
    return own + (4 * trained(a, batch) if batch.lora_rank else 0)


def teacher_weights(a: Architecture, compute: int, quantization: str = "none") -> float:
    """P c; if quantised, 1 or about 0.52 bytes for each weight of a linear layer other than the head."""
    if quantization == "none":
        return a.parameters * compute
    return a.linear * QUANTIZED[quantization] + (a.parameters - a.linear) * compute


def compute_copy(a: Architecture, batch: Batch) -> int:
    """2 P under bf16: until the pass ends, autocast keeps a copy of every float32 weight in a matrix product."""
    if batch.residual == batch.compute:
        return 0
    return 2 * (a.linear + a.vocabulary * a.hidden)


def layer(a: Architecture, batch: Batch) -> int:
    """Bytes a decoder layer keeps per token: the sum of `_LAYER`, 8 per head, c S for the mask, 7 c per LoRA rank."""
    h, m, q, k = _LAYER["lora" if batch.lora_rank else "all", batch.compute]
    numbers = h * a.hidden + m * a.mlp + q * a.queries + k * a.keys + 8 * a.heads
    return numbers + batch.compute * (batch.length + 7 * batch.lora_rank)


def vision_layer(a: Architecture, batch: Batch) -> int:
    """Bytes a layer of the vision tower keeps per patch; 0 under LoRA, which does not train the tower."""
    h, m = _VISION_LAYER[batch.compute]
    return 0 if batch.lora_rank else h * a.vision_hidden + m * a.vision_mlp + 4 * a.vision_heads


def activations(a: Architecture, batch: Batch) -> tuple[int, int]:
    """(decoder, vision tower): bytes that the forward pass keeps for the backward pass.

    Decoder: n L × `layer`, or with checkpointing n L × r H, plus 4 r H per token (last states and their norm). Tower:
    its layers, the pictures (4 bytes per number), and for every merger (4 c + 4) × its hidden size per patch.
    """
    tokens, patches = batch.rows * batch.length, batch.rows * batch.patches
    per_token = batch.residual * a.hidden if batch.checkpointing else layer(a, batch)
    decoder = tokens * (a.layers * per_token + 4 * batch.residual * a.hidden)
    if batch.lora_rank:
        return decoder, patches * 4 * a.pixels
    per_patch = batch.compute * a.vision_hidden if batch.checkpointing else vision_layer(a, batch)
    ends = 4 * a.pixels + a.mergers * (4 * batch.compute + 4) * a.vision_hidden
    return decoder, patches * (a.vision_layers * per_patch + ends)


def recomputed(a: Architecture, batch: Batch) -> int:
    """The backward pass of one decoder layer: 3 c M + 2 r H of gradients per token; if recomputed, plus `layer`."""
    per_token = 3 * batch.compute * a.mlp + 2 * batch.residual * a.hidden
    return batch.rows * batch.length * (per_token + (layer(a, batch) if batch.checkpointing else 0))


def scores(a: Architecture, batch: Batch, teacher_hidden: int = 0, scored: int = 0) -> tuple[int, int]:
    """(kept, temporary): bytes for log-probabilities and entropies of n tokens, and for the divergence of n_D tokens.

    Kept: the states, n r H and n_D r H, and the teacher's, n_D c H_T. Temporary, in the backward pass: the gradients
    of these states, (4 + r) H, and of the head, 4 V H for each of the two (none under LoRA), and tiles of
    min(n, 4096) × 32768: one in c for the log-probabilities, two in float32 for the divergence.

    Args:
        a, batch: of the student.
        teacher_hidden: H_T; 0 without distillation.
        scored: n; 0: all tokens of the completions (n_D is always all).
    """
    n, n_d = scored or batch.rows * batch.completion, batch.rows * batch.completion if teacher_hidden else 0
    kept = (n + n_d) * batch.residual * a.hidden + n_d * batch.compute * teacher_hidden
    tiles = TILE_WORDS * max(min(n, TILE_TOKENS) * batch.compute, min(n_d, TILE_TOKENS) * 8)
    head = 0 if batch.lora_rank else (2 if n_d else 1) * 4 * a.vocabulary * a.hidden
    return kept, tiles + head + (n + n_d) * (4 + batch.residual) * a.hidden


def update(a: Architecture, batch: Batch, teacher_hidden: int, gradients: float, copy: float) -> float:
    """The peak of a forward and backward pass, in bytes.

    It is either at the head (all activations, scores, the head's gradients) or at the end of the backward pass (the
    vision tower's activations, and gradients of all weights). With several windows, gradients are always present. If
    the embeddings are tied, the gradients of both uses, 4 V H each, are added last.
    """
    decoder, vision = activations(a, batch)
    kept, passing = scores(a, batch, teacher_hidden)
    before = gradients if batch.windows > 1 else 0.0
    at_head = before + decoder + vision + kept + max(passing, recomputed(a, batch)) + copy
    embedding = 0 if batch.lora_rank or a.head else 8 * a.vocabulary * a.hidden
    at_end = gradients + vision + max(recomputed(a, batch), embedding) + (0.0 if batch.checkpointing else copy)
    return max(at_head, at_end)


def forward_only(a: Architecture, tokens: int, patches: int, compute: int, residual: int) -> int:
    """A forward pass without gradients: pictures and their features, and one active layer of decoder or tower.

    4 bytes per number of the pictures and c H per merged token of every merger, plus the larger of (max(3 M, 6 Q) c +
    (4 r + 8) H) per token in the decoder, and max(10 hidden size, 3 mlp) c per patch in the tower.
    """
    features = patches * 4 * a.pixels + patches // a.merge**2 * a.mergers * compute * a.hidden
    decoder = tokens * (max(3 * a.mlp, 6 * a.queries) * compute + (4 * residual + 8) * a.hidden)
    return features + max(decoder, patches * max(10 * a.vision_hidden, 3 * a.vision_mlp) * compute)


def rollouts(a: Architecture, batch: Batch, rows: int, new_tokens: int) -> int:
    """Generation of ``rows`` completions: the prompt's forward pass or the last token, whichever needs more.

    Keys and values take L (r + c) K per token (rotated keys have r bytes per number); at the end one more layer of
    them, repeated for all heads, (r + 2 c) Q + r K per token, and 16 V per row for the next token's logits.
    """
    c, r = batch.compute, batch.residual
    per_token, patches = a.layers * (r + c) * a.keys, rows * batch.patches
    reading = rows * batch.prompt * per_token + forward_only(a, rows * batch.prompt, patches, c, r)
    n = rows * (batch.prompt + new_tokens)
    writing = n * (per_token + (r + 2 * c) * a.queries + r * a.keys) + patches * 4 * a.pixels
    return max(reading, writing) + 16 * rows * a.vocabulary


def teacher_forward(a: Architecture, batch: Batch) -> int:
    """Reading the gated rows, at most 64 at a time, and two copies of the states that predict tokens, c H per token."""
    rows = min(batch.rows, TEACHER_ROWS)
    working = forward_only(a, rows * batch.length, rows * batch.patches, batch.compute, batch.compute)
    return working + 2 * batch.rows * batch.completion * batch.compute * a.hidden
