"""Private names of TRL, transformers and accelerate that the package leans on: what an upgrade has to look at.

tests/unit/test_trl_hooks.py fails where one of them is gone, and where the package uses one that is not listed here.
"""

from trl.kernels.chunked_divergence import _addmm_fp32 as addmm_fp32
from trl.kernels.chunked_divergence import _compute_dtype as compute_dtype
from trl.kernels.chunked_divergence import _project as project

__all__ = ["HOOKS", "addmm_fp32", "compute_dtype", "project"]

#: By owner: methods that are overridden or called, attributes that are read or set, functions.
HOOKS: dict[str, tuple[str, ...]] = {
    "transformers.Trainer": (
        "_run_epoch",  # overridden: a checkpoint with all steps behind it takes no further one
        "_save_checkpoint",  # overridden: a checkpoint is written beside its place, with the loop's state
        "_load_rng_state",  # overridden: the last thing that is restored, and the loop's state with it
        "_get_train_sampler",  # overridden: past epochs are shuffled once more; SFT leaves out a last partial step
        "_tr_loss",  # the loss since the last log, and
        "_globalstep_last_logged",  # the step of that log: both are kept in a checkpoint
    ),
    "accelerate.state.PartialState": (
        "_shared_state",  # put back after a trainer that was made on trial, as those of its two subclasses
    ),
    "trl.GRPOTrainer": (
        "_generate",  # overridden: exploration replaces completions before anything is computed from them
        "_generate_single_turn",  # overridden and called: the generation back end, for hint-aware draws too
        "_generate_and_score_completions",  # overridden: the gate joins the batch, whose entries are read by name
        "_calculate_rewards",  # overridden and called: one matrix of rewards for everything
        "_compute_loss",  # overridden: the divergence joins the loss; it calls the model once, with fused_lm_head
        "_tokenize_prompts",  # overridden and called: rows without pictures, hint-aware prompts
        "_get_per_token_logps_and_entropies",  # overridden and called: token types, injected completions
        "_tokenizer",  # for the token that pads
        "_metrics",  # by mode and name, the values since the last log: ours are logged with TRL's
        "_logs",  # the table of completions, whose advantages are put right
        "_pending_extra_logs",  # what reward functions have logged by column, and
        "_pending_metrics",  # as metrics: kept apart for draws that may never be trained on
        "_last_loaded_step",  # of which step the weights are that vLLM has
        "_step",  # micro-batches so far, and
        "_buffered_inputs",  # the rollouts of a generation window: both are kept in a checkpoint
        "_tag_names",  # what the model card says of the method:
        "_name",
        "_paper",
    ),
    "trl.generation.vllm_generation.VLLMGeneration": (
        "_place_features",  # replaced: a server's pictures are as large as the trainer's
    ),
    "trl.generation.vllm_client.VLLMClient": (
        "_post",  # wrapped: newer vLLMs name a token otherwise
    ),
    "trl.DistillationTrainer": (
        "_generate_and_score_completions",  # overridden: MM-GKD keeps the rows of the batch
        "_tokenize_prompts",  # overridden and called: inputs that would not reach the models are refused
        "_generate_single_turn",  # overridden: right answers in the place of the student's completions
        "_tokenizer",  # which cuts them into tokens
    ),
    "trl.kernels.chunked_divergence": (
        "_project",  # logits of a chunk in float32, for the kernel over a served teacher's top tokens
        "_addmm_fp32",  # its gradients, summed up in float32
        "_compute_dtype",  # the precision under autocast
    ),
}
