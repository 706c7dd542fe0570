"""Private names of TRL, transformers and accelerate that the package uses. Check them at every upgrade.

tests/unit/test_trl_hooks.py fails if one of them is gone, or if the package uses one that is not listed here.
"""

from trl.kernels.chunked_divergence import _addmm_fp32 as addmm_fp32
from trl.kernels.chunked_divergence import _compute_dtype as compute_dtype
from trl.kernels.chunked_divergence import _project as project

__all__ = ["HOOKS", "addmm_fp32", "compute_dtype", "project"]

#: By owner: methods that are overridden or called, attributes that are read or set, functions.
HOOKS: dict[str, tuple[str, ...]] = {
    "transformers.Trainer": (
        "_run_epoch",  # overridden: a finished checkpoint trains no further step
        "_save_checkpoint",  # overridden: a checkpoint is written atomically, with the loop's state
        "_load_rng_state",  # overridden: transformers restores it last; the loop's state is restored with it
        "_get_train_sampler",  # overridden: past epochs' shuffles are repeated; SFT drops a last partial step
        "_tr_loss",  # the loss since the last log, and
        "_globalstep_last_logged",  # the step of that log: both are kept in a checkpoint
    ),
    "accelerate.state.PartialState": (
        "_shared_state",  # restored after a trial trainer, here and in its two subclasses
    ),
    "trl.GRPOTrainer": (
        "_generate",  # overridden: exploration replaces completions before anything is computed from them
        "_generate_single_turn",  # overridden and called: the generation back end, for hint-aware draws too
        "_generate_and_score_completions",  # overridden: adds the gate to the batch, whose entries are read by name
        "_calculate_rewards",  # overridden and called: one matrix of rewards for everything
        "_compute_loss",  # overridden: the divergence joins the loss; it calls the model once, with fused_lm_head
        "_tokenize_prompts",  # overridden and called: rows without pictures, hint-aware prompts
        "_get_per_token_logps_and_entropies",  # overridden and called: token types, injected completions
        "_tokenizer",  # for the padding token
        "_metrics",  # mode → name → values since the last log: ours are logged with TRL's
        "_logs",  # the table of completions, whose advantages are corrected
        "_pending_extra_logs",  # columns that reward functions have logged, and
        "_pending_metrics",  # their metrics: kept apart for draws that may never be trained on
        "_last_loaded_step",  # the step whose weights vLLM has
        "_step",  # micro-batches so far, and
        "_buffered_inputs",  # the rollouts of a generation window: both are kept in a checkpoint
        "_tag_names",  # for the model card, like the next two
        "_name",
        "_paper",
    ),
    "trl.generation.vllm_generation.VLLMGeneration": (
        "_place_features",  # replaced: checks that a server's pictures have the trainer's size
    ),
    "trl.generation.vllm_client.VLLMClient": (
        "_post",  # wrapped: newer vLLM versions name tokens differently
    ),
    "trl.DistillationTrainer": (
        "_generate_and_score_completions",  # overridden: MM-GKD keeps the rows of the batch
        "_tokenize_prompts",  # overridden and called: inputs that would not reach the models are refused
        "_generate_single_turn",  # overridden: right answers instead of the student's completions
        "_tokenizer",  # for these answers
    ),
    "trl.kernels.chunked_divergence": (
        "_project",  # logits of a chunk in float32, for the kernel over a served teacher's top tokens
        "_addmm_fp32",  # its gradients, summed in float32
        "_compute_dtype",  # the precision under autocast
    ),
}
