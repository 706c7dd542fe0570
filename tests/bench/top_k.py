"""What is lost where a served teacher tells its k likeliest next tokens alone: ``python tests/bench/top_k.py``.

The embedded student's own completions of training questions, both embedded models' next-token distributions over
them, and for each k what `objective.top_k_divergence` makes of it: its mean, how much of the whole it is, and the
cosine of its gradient (by the student's logits) with that of the whole. Prints a Markdown table.
"""

import sys

import torch

from kepo_core.experiment import experiment
from kepo_core.experiment.models import load_model
from kepo_core.method import objective
from kepo_core.params import Params
from kepo_core.task.dataset import to_dataset

SIZES = (1, 2, 5, 10, 20, 50, 100)
BETAS = {"forward KL": 0.0, "JSD, β = 0.5": 0.5, "reverse KL": 1.0}


@torch.no_grad()
def completions(questions: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, V) logits of student and teacher at every token of one sampled completion of each question."""
    params = Params(explore=False)
    data = experiment.load_data(params)
    models = experiment.load_models(params)
    student, teacher = models.student, load_model(params.teacher, "teacher", trained=False)
    processor = models.processor
    eos = processor.tokenizer.eos_token_id
    torch.manual_seed(seed)
    found = []
    for row in to_dataset(data.train[:questions], thinking=True):
        text = processor.apply_chat_template(row["prompt"], tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[text], images=[[row["image"]]], return_tensors="pt")
        ids = student.generate(**inputs, do_sample=True, top_k=0, max_new_tokens=48, eos_token_id=eos)
        said = ids.shape[1] - inputs["input_ids"].shape[1]
        more = torch.zeros(1, said, dtype=torch.long)
        inputs["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], more], 1)
        inputs["input_ids"], inputs["attention_mask"] = ids, torch.ones_like(ids)
        found.append([model(**inputs).logits[0, -said - 1 : -1] for model in (student, teacher)])
    own, theirs = (torch.cat(parts) for parts in zip(*found, strict=True))
    return own, theirs


def measure(student: torch.Tensor, teacher: torch.Tensor, k: int, beta: float) -> tuple[float, float, float]:
    """Mean divergence (nats), its share of the whole, and the cosine of the gradients."""
    values, ids = teacher.double().log_softmax(-1).topk(k)
    rest = torch.log((1 - values.exp().sum(-1, keepdim=True)).clamp(min=1e-8))
    grads, means = [], []
    for part in (False, True):
        logits = student.clone().requires_grad_()
        told = (ids, torch.cat([values, rest], -1).float())
        found = objective.top_k_divergence(logits, *told, beta) if part else objective.divergence(logits, teacher, beta)
        found.sum().backward()
        grads.append(logits.grad.flatten())
        means.append(found.mean().item())
    return means[1], means[1] / means[0], float(torch.nn.functional.cosine_similarity(*grads, dim=0))


def main(questions: int = 200) -> None:
    """Measure and print."""
    student, teacher = completions(questions)
    likeliest = teacher.softmax(-1).topk(max(SIZES)).values.cumsum(-1).mean(0)
    print(f"{len(student)} tokens of {questions} completions, {student.shape[1]} tokens in the vocabulary\n")
    print("| k | teacher's mass | " + " | ".join(BETAS) + " |\n|---" * 1 + "|---" * (1 + len(BETAS)) + "|")
    for k in SIZES:
        cells = [measure(student, teacher, k, beta) for beta in BETAS.values()]
        shares = [f"{100 * share:.2f} % ({cosine:.4f})" for _, share, cosine in cells]
        print(f"| {k} | {likeliest[k - 1]:.4f} | " + " | ".join(shares) + " |")
    whole = [objective.divergence(student, teacher, beta).mean() for beta in BETAS.values()]
    print("| whole, nats a token | 1 | " + " | ".join(f"{value:.4f}" for value in whole) + " |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
