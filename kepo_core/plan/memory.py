"""What a step of training takes on one GPU, in bytes: one pure function per item, each with its formula.

Notation: H hidden size, M mlp, Q and K all query and all key heads together, V vocabulary, L layers, n tokens, S the
longest sequence; P parameters; c bytes of a number that is computed with (4, or 2 under bf16), r those of the states
that run from layer to layer (4 where weights are float32 masters, c under LoRA, whose base is kept in c).
Every row counts with its own prompt: a run takes less where the rows of a group share one (`method.shared_prompts`,
`method.shared_scoring`). What is said of layers was counted on Qwen3-VL (it is what PyTorch keeps, to the byte); other
families differ somewhat.
"""

from dataclasses import dataclass

from kepo_core.plan.architecture import Architecture

#: Bytes that a decoder layer keeps for the backward pass, per token, as multiples of H, M, Q and K.
_LAYER = {
    ("all", 4): (24, 16, 24, 8),
    ("all", 2): (26, 8, 14, 6),
    ("lora", 4): (16, 16, 20, 4),
    ("lora", 2): (18, 8, 14, 4),
}
#: And one of the vision tower, per patch, of its hidden size and mlp.
_VISION_LAYER = {4: (44, 8), 2: (22, 4)}
#: TRL's kernels hold tiles of at most so many tokens by so many words of the vocabulary.
TILE_TOKENS, TILE_WORDS = 4096, 32768
#: Most teacher rows in one forward pass (``Teacher.batch_size``).
TEACHER_ROWS = 64
#: Bytes of a weight in a quantised linear layer, with what is kept to read it (4 bits: NF4, scales quantised again).
QUANTIZED = {"8bit": 1.0, "4bit": 0.516}


@dataclass(frozen=True)
class Batch:
    """The tensors of one process.

    Attributes:
        rows: sequences in one forward pass, prompts × G.
        windows: forward passes per optimiser step; so many times ``rows`` are generated at once.
        prompt: tokens of the longest prompt, the picture's included.
        completion: tokens of the longest completion.
        patches: patches of a row's picture.
        compute: c.
        lora_rank: 0 where all weights are trained.
        checkpointing: whether layers keep their inputs alone.
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
        """S, tokens of a whole sequence."""
        return self.prompt + self.completion

    @property
    def residual(self) -> int:
        """Bytes r of a number between two layers."""
        return self.compute if self.lora_rank else 4


def trained(a: Architecture, batch: Batch) -> int:
    """Parameters with a gradient: P, or under LoRA rank × (inputs + outputs of the decoder's linear layers)."""
    return batch.lora_rank * a.adapted if batch.lora_rank else a.parameters


def student_weights(a: Architecture, batch: Batch) -> int:
    """4 P (float32 masters); under LoRA c P for what the adapters stand on, and 4 bytes for each of theirs."""
    own = a.parameters * (batch.compute if batch.lora_rank else 4)
    return own + (4 * trained(a, batch) if batch.lora_rank else 0)


def teacher_weights(a: Architecture, compute: int, quantization: str = "none") -> float:
    """P c; where linear layers are quantised (all but the head), 1 or about 0.52 bytes for each of their weights."""
    if quantization == "none":
        return a.parameters * compute
    return a.linear * QUANTIZED[quantization] + (a.parameters - a.linear) * compute


def compute_copy(a: Architecture, batch: Batch) -> int:
    """2 P under bf16: autocast keeps a copy of every float32 weight that it multiplies with, until the pass ends."""
    if batch.residual == batch.compute:
        return 0
    return 2 * (a.linear + a.vocabulary * a.hidden)


def layer(a: Architecture, batch: Batch) -> int:
    """What a decoder layer keeps of one token: Σ of `_LAYER`, 8 bytes a head, c S for the mask, 7 c a rank of LoRA."""
    h, m, q, k = _LAYER["lora" if batch.lora_rank else "all", batch.compute]
    numbers = h * a.hidden + m * a.mlp + q * a.queries + k * a.keys + 8 * a.heads
    return numbers + batch.compute * (batch.length + 7 * batch.lora_rank)


def vision_layer(a: Architecture, batch: Batch) -> int:
    """What one layer of the vision tower keeps of one patch; nothing under LoRA, which leaves the tower alone."""
    h, m = _VISION_LAYER[batch.compute]
    return 0 if batch.lora_rank else h * a.vision_hidden + m * a.vision_mlp + 4 * a.vision_heads


def activations(a: Architecture, batch: Batch) -> tuple[int, int]:
    """(decoder's, vision tower's): what the forward pass keeps for the backward pass.

    n L × layer; with checkpointing n L × r H. At its ends 4 r H a token (last states and their norm), and in the tower
    the pictures (4 bytes a number) and 4 c + 4 times its hidden size a patch for every merger.
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
    """One decoder layer gone back through: 3 c M + 2 r H of gradients a token, and all it keeps if it is recomputed."""
    per_token = 3 * batch.compute * a.mlp + 2 * batch.residual * a.hidden
    return batch.rows * batch.length * (per_token + (layer(a, batch) if batch.checkpointing else 0))


def scores(a: Architecture, batch: Batch, teacher_hidden: int = 0, scored: int = 0) -> tuple[int, int]:
    """(kept, passing): of log-probabilities and entropies of n tokens, and of the divergence of n_D.

    Kept: the states, n r H and n_D r H, and the teacher's, n_D c H_T. Passing, in the backward pass: the gradients of
    these states, (4 + r) H, and of the head, 4 V H for each of the two (none under LoRA), and tiles of
    min(n, 4096) × 32768, for the log-probabilities one of c and for the divergence two of float32.

    Args:
        a, batch: the student's.
        teacher_hidden: H_T; 0 where nothing is distilled.
        scored: n, where it is not all tokens of the completions, which n_D always is.
    """
    n, n_d = scored or batch.rows * batch.completion, batch.rows * batch.completion if teacher_hidden else 0
    kept = (n + n_d) * batch.residual * a.hidden + n_d * batch.compute * teacher_hidden
    tiles = TILE_WORDS * max(min(n, TILE_TOKENS) * batch.compute, min(n_d, TILE_TOKENS) * 8)
    head = 0 if batch.lora_rank else (2 if n_d else 1) * 4 * a.vocabulary * a.hidden
    return kept, tiles + head + (n + n_d) * (4 + batch.residual) * a.hidden


def update(a: Architecture, batch: Batch, teacher_hidden: int, gradients: float, copy: float) -> float:
    """The largest moment of a forward and backward pass.

    Either at the head (all activations, scores, the head's gradients) or in the last layer that is gone back through
    (the vision tower's activations, and gradients of all weights); with several windows gradients are always there.
    Where the output embedding is the input's, its gradient as the one and as the other, 4 V H each, are added up last.
    """
    decoder, vision = activations(a, batch)
    kept, passing = scores(a, batch, teacher_hidden)
    before = gradients if batch.windows > 1 else 0.0
    at_head = before + decoder + vision + kept + max(passing, recomputed(a, batch)) + copy
    embedding = 0 if batch.lora_rank or a.head else 8 * a.vocabulary * a.hidden
    at_end = gradients + vision + max(recomputed(a, batch), embedding) + (0.0 if batch.checkpointing else copy)
    return max(at_head, at_end)


def forward_only(a: Architecture, tokens: int, patches: int, compute: int, residual: int) -> int:
    """A forward pass without gradients: pictures and their features, and one layer at work, of either part.

    4 bytes a number of the pictures and c H for each merged token of every merger; the larger of (max(3 M, 6 Q) c +
    (4 r + 8) H) a token in the decoder, and max(10 hidden sizes, 3 mlps) c a patch in the tower.
    """
    features = patches * 4 * a.pixels + patches // a.merge**2 * a.mergers * compute * a.hidden
    decoder = tokens * (max(3 * a.mlp, 6 * a.queries) * compute + (4 * residual + 8) * a.hidden)
    return features + max(decoder, patches * max(10 * a.vision_hidden, 3 * a.vision_mlp) * compute)


def rollouts(a: Architecture, batch: Batch, rows: int, new_tokens: int) -> int:
    """Generation of ``rows`` completions: the prompt's forward pass, or its end, whichever is larger.

    Keys and values take L (r + c) K a token (keys are rotated, by cosines as wide as the states); at the end one layer
    more of them, spread to all heads, (r + 2 c) Q + r K a token, and 16 V a row for the next token's logits.
    """
    c, r = batch.compute, batch.residual
    per_token, patches = a.layers * (r + c) * a.keys, rows * batch.patches
    reading = rows * batch.prompt * per_token + forward_only(a, rows * batch.prompt, patches, c, r)
    n = rows * (batch.prompt + new_tokens)
    writing = n * (per_token + (r + 2 * c) * a.queries + r * a.keys) + patches * 4 * a.pixels
    return max(reading, writing) + 16 * rows * a.vocabulary


def teacher_forward(a: Architecture, batch: Batch) -> int:
    """Reading the gated rows, at most 64 at a time, and the states that predict completions, c H a token, twice."""
    rows = min(batch.rows, TEACHER_ROWS)
    working = forward_only(a, rows * batch.length, rows * batch.patches, batch.compute, batch.compute)
    return working + 2 * batch.rows * batch.completion * batch.compute * a.hidden
