"""What makes a hint good? Measures of hints for held-out questions, and the acceptance rate of the student's draws.

Nothing is trained. Every question gets one hint, given without the answer (``hint_context: hint``): a draw's gain comes
from the hint only.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch

from kepo_core.analysis import faithfulness
from kepo_core.data.images import Pictures, load_image
from kepo_core.data.phantom import Facts
from kepo_core.data.records import LETTERS, Question
from kepo_core.data.splits import image_key
from kepo_core.experiment.evaluation import evaluate, length_batches
from kepo_core.experiment.pair import Models
from kepo_core.method.task import with_images
from kepo_core.params import Params
from kepo_core.task.dataset import to_dataset
from kepo_core.task.multiple_choice import MultipleChoice
from kepo_core.task.prompts import Messages, hint_aware_messages, vqa_messages

#: The measures of a hint, each a column of `probe`.
MEASURES = {
    "gain": "log-probability of the right letter, answered at once, with the hint minus without it (nats)",
    "tokens": "length of the hint in tokens",
    "leaks letter": "1 if the hint names the right letter, else 0",
    "stated": "number of claims about the picture in the hint (PhantomVQA)",
    "true": "share of these claims that are true; missing if there are none",
    "relevant": "share of the facts needed for the answer that the hint states, true or not (PhantomVQA)",
}
_COLUMNS = ["id", "modality", "image", "question_type", "hint", *MEASURES]
_BOOTSTRAP = 2_000  # resamples for an interval
#: Text between the prompt and the letter when the student answers at once.
_AT_ONCE = "<think></think><answer>"


def probe(
    params: Params,
    models: Models,
    questions: Sequence[Question],
    facts: Mapping[str, Facts] | None = None,
    *,
    draws: int = 8,
) -> pd.DataFrame:
    """A row per question that got a readable hint: ids, the hint, MEASURES, and two shares of accepted draws.

    ``accepted`` is the share of ``draws`` hint-aware draws that are right, ``plain`` the same without the hint, in
    [0, 1]. Hints and draws depend on the seed of ``params``. Without ``facts`` (by image key) the last three measures
    are missing. Raises ``ValueError`` without a teacher.
    """
    if models.teacher is None:
        raise ValueError("models: no teacher, expected one that writes hints (explore with a hint).")
    pictures = Pictures(params.image_size, params.image_fit)
    rows = list(to_dataset(questions, thinking=True, pictures=pictures))
    task = MultipleChoice()
    written = models.teacher.write_hints(
        [with_images(task.ask(row), row) for row in rows], max_tokens=params.hint_max_tokens, seed=params.seed
    )
    readable = [(q, hint) for q, hint in zip(questions, written, strict=True) if hint is not None]
    if not readable:
        return pd.DataFrame(columns=[*_COLUMNS, "accepted", "plain"])
    asked = [q for q, _ in readable]
    plain = [vqa_messages(q.question, q.options, thinking=True) for q in asked]
    hinted = [hint_aware_messages(q.question, q.options, hint, q.answer, "hint") for q, hint in readable]
    share = partial(_accepted, params, models, asked, draws)
    gains = letter_log_probs(params, models, asked, hinted) - letter_log_probs(params, models, asked, plain)
    tokenizer = models.processor.tokenizer
    found = [
        {
            "id": q.id,
            "modality": q.modality,
            "image": image_key(q),
            "question_type": q.question_type,
            "hint": hint,
            "gain": float(gain),
            "tokens": len(tokenizer(hint)["input_ids"]),
            "leaks letter": float(names_letter(hint, q.answer)),
            **_stated(hint, q, facts),
        }
        for (q, hint), gain in zip(readable, gains, strict=True)
    ]
    return pd.DataFrame(found, columns=_COLUMNS).assign(accepted=share(hinted), plain=share(plain))


def letter_log_probs(
    params: Params, models: Models, questions: Sequence[Question], messages: Sequence[Messages]
) -> np.ndarray:
    """Log π_θ(right letter) among the letters of a question's options, answered at once: (questions,).

    The student reads the prompt and an empty thought; the next token's distribution gives the log-probability.
    """
    processor, model = models.processor, models.student
    texts = [
        processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) + _AT_ONCE
        for prompt in messages
    ]
    ids = {letter: processor.tokenizer(letter, add_special_tokens=False)["input_ids"][0] for letter in LETTERS}
    found = np.zeros(len(questions))
    was_training = model.training
    model.eval()
    for batch in length_batches([len(text) for text in texts], params.eval_batch_size):
        images = [[load_image(questions[i].image, params.image_size, params.image_fit)] for i in batch]
        inputs = processor(
            text=[texts[i] for i in batch], images=images, padding=True, padding_side="left", return_tensors="pt"
        )
        with torch.no_grad():
            logits = model(**inputs.to(model.device), logits_to_keep=1).logits[:, -1].float().cpu()
        for row, i in zip(logits, batch, strict=True):
            letters = LETTERS[: len(questions[i].options)]
            over = torch.log_softmax(row[[ids[letter] for letter in letters]], dim=-1)
            found[i] = float(over[letters.index(questions[i].answer)])
    model.train(was_training)
    return found


def names_letter(hint: str, letter: str) -> bool:
    """Whether ``hint`` names the option's letter as a word of its own; the article of "A finding" does not count."""
    alone = rf"(?<![\w'-]){letter}(?![\w'-])"
    if letter == "A":
        alone = rf"{alone}(?! [a-z])|\b(?i:is|option|answer|letter|choose) {alone}"
    return re.search(alone, hint) is not None


def correlations(found: pd.DataFrame) -> pd.DataFrame:
    """Spearman's ρ of every measure with ``accepted``: a row per modality, then "all"; cells "ρ [95 %]" or "–".

    The interval is a percentile bootstrap over images. A measure that does not vary, or is known for fewer than ten
    hints, has no correlation. "all" uses ranks within modalities, which removes differences between modalities.
    """
    rows: dict[str, dict[str, str]] = {}
    parts = {str(name): part for name, part in found.groupby("modality", sort=False)}
    for name, part in {**parts, "all": found}.items():
        rows[name] = {"n": str(len(part))} | {measure: _correlation(part, measure) for measure in MEASURES}
    return pd.DataFrame.from_dict(rows, orient="index")


def _correlation(part: pd.DataFrame, measure: str) -> str:
    known = part.dropna(subset=[measure])
    if len(known) < 10 or known[measure].nunique() < 2 or known["accepted"].nunique() < 2:
        return "–"
    ranks = known.groupby("modality")[[measure, "accepted"]].rank(pct=True).to_numpy()
    _, image = np.unique(known["image"], return_inverse=True)
    count = int(image.max()) + 1
    # How often each image is sampled: multinomial counts are samples with replacement.
    times = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), size=_BOOTSTRAP)[:, image]
    low, high = np.nanquantile(_pearson(ranks, times), [0.025, 0.975])
    return f"{float(_pearson(ranks, np.ones((1, len(ranks))))[0]):+.2f} [{low:+.2f}, {high:+.2f}]"


def _pearson(ranks: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Correlation of both columns of ``ranks`` (n, 2) for each row of weights ``times`` (resamples, n): (resamples,).

    NaN if a column does not vary.
    """
    total = times.sum(axis=1)
    x, y = ranks.T
    mean_x, mean_y = times @ x / total, times @ y / total
    covariance = times @ (x * y) / total - mean_x * mean_y
    variances = (times @ x**2 / total - mean_x**2) * (times @ y**2 / total - mean_y**2)
    return np.where(variances > 1e-12, covariance / np.sqrt(np.maximum(variances, 1e-12)), np.nan)


def _stated(hint: str, question: Question, facts: Mapping[str, Facts] | None) -> dict[str, float]:
    if not facts:
        return {"stated": np.nan, "true": np.nan, "relevant": np.nan}
    judged = faithfulness.judge(f"<think>{hint}</think>", "", question, facts[image_key(question)])
    share = judged.true / judged.stated if judged.stated else np.nan
    return {"stated": judged.stated, "true": share, "relevant": judged.relevant}


def _accepted(
    params: Params, models: Models, questions: Sequence[Question], draws: int, messages: Sequence[Messages]
) -> list[float]:
    """The share of right answers among ``draws`` answers to each question, sampled at temperature 1."""
    answers = evaluate(
        models.student,
        models.processor,
        questions,
        thinking=True,
        max_tokens=params.of_trl("max_completion_length"),
        batch_size=params.eval_batch_size,
        pictures=partial(load_image, image_size=params.image_size, fit=params.image_fit),
        messages=messages,
        temperature=1.0,
        samples=draws,
        seed=params.seed,
        answer_format=params.answer_format,
    )
    right = np.array([answer.correct for answer in answers], dtype=float)
    return list(right.reshape(len(questions), draws).mean(axis=1))
