"""Both parts of KEPO over tiny models of nine families, with text alone, one picture, several, and mixtures of rows."""

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from kepo_harness import picture
from text_harness import hinting
from tiny_architectures import ARCHITECTURES, build
from transformers import ProcessorMixin

from kepo_core import KEPOConfig, KEPOTrainer, Teacher, Templates
from kepo_core.method.task import images_in, with_images
from kepo_core.method.vision import FURTHER, beside_tokens, by_row, check_inputs, check_pictured, further_inputs

#: Pictures of each of the four rows. What a family refuses is in REFUSED.
KINDS = {"text": (0, 0, 0, 0), "one": (1, 1, 1, 1), "two": (2, 2, 2, 2), "mixed": (1, 0, 2, 1), "some": (1, 0, 0, 1)}
#: family → kind → the sentence
REFUSED = {
    ("smolvlm", "mixed"): "16 rows have 16 pictures in all but not one each",
}
CASES = [(name, kind) for name in ARCHITECTURES for kind in KINDS if name != "qwen3" or kind == "text"]


def rows(counts: tuple[int, ...]) -> Dataset:
    """A picture's size and colours are its own, so that another row's would be noticed."""
    made: list[dict[str, Any]] = []
    for i, count in enumerate(counts):
        pictures = [
            picture((60 * (i + k) % 256, 40, 200 - 50 * (i + 2 * k))).resize((48 + 16 * k, 64)) for k in range(count)
        ]
        prompt = [{"role": "user", "content": f"Riddle {i}?"}]
        made.append({"prompt": prompt, "solution": "red"} | ({"images": pictures} if any(counts) else {}))
    return Dataset.from_list(made)


def lucky(completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Pays a completion in six, so that some groups of a random model fail and some draws are accepted."""
    return [float(sum(ids) % 6 == 0) for ids in completion_ids]


def make(folder: Path, name: str, kind: str, **overrides: Any) -> KEPOTrainer:
    student, processor = build(name, 0)
    teacher, of_teacher = build(name, 1, hidden=48, padded_rows=24)
    args = KEPOConfig(
        str(folder), **{
            "num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2,
            "max_completion_length": 5, "max_steps": 2, "num_iterations": 1, "logging_steps": 1, "learning_rate": 1e-3,
            "save_strategy": "no", "use_cpu": True, "disable_tqdm": True, "report_to": "none", "rejection_budget": 8,
        } | overrides,
    )  # fmt: skip
    task = Templates(asking="It is {solution}. Write a hint in <hint>...</hint>.", telling="The hint is {hint}.")
    return KEPOTrainer(
        student, lucky, args, rows(KINDS[kind]), processing_class=processor,
        teacher=hinting(Teacher(teacher, of_teacher)), task=task,
    )  # fmt: skip


def alone(model: Any, processor: Any, row: dict[str, Any], completion: list[int]) -> torch.Tensor:
    """log π of a completion's tokens, (t, V), from a batch of this row alone and no code of TRL's."""
    prompt = with_images(row["prompt"], row)
    vision = isinstance(processor, ProcessorMixin)
    if vision and not images_in(prompt):
        prompt = [{"role": "user", "content": [{"type": "text", "text": prompt[0]["content"]}]}]
    text = processor.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    pictures = {"images": [images_in(prompt)]} if images_in(prompt) else {}
    inputs = dict(processor(text=[text], **pictures, add_special_tokens=False, return_tensors="pt"))
    said = torch.tensor([completion])
    for field, value in inputs.items():
        if field in ("input_ids", "attention_mask") or field.endswith("token_type_ids"):
            more = said if field == "input_ids" else torch.ones_like(said) * (field == "attention_mask")
            inputs[field] = torch.cat([torch.as_tensor(value), more.to(value.dtype)], 1)
    with torch.no_grad():
        return model(**inputs).logits[0, -len(completion) - 1 : -1].log_softmax(-1)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_both_parts_train_every_family_on_every_kind_of_row(tmp_path: Path, name: str, kind: str) -> None:
    trainer = make(tmp_path, name, kind)
    if (name, kind) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[name, kind]):
            trainer.train()
        return
    trainer.train()
    logs = trainer.state.log_history[:-1]
    assert sum(log["kepo/explored_groups"] for log in logs) >= 1 and sum(log["kepo/accepted"] for log in logs) >= 1
    assert all(0 < log["kepo/divergence"] < 100 for log in logs)


@pytest.mark.parametrize(("name", "kind"), [case for case in CASES if case not in REFUSED])
def test_student_and_teacher_see_each_row_with_its_own_pictures(tmp_path: Path, name: str, kind: str) -> None:
    """In batches, shuffled and cut in two as TRL does, the same as each row alone."""
    trainer = make(tmp_path, name, kind, temperature=0.7)
    trainer.current_gradient_accumulation_steps = 2
    trainer.model.train()
    data = trainer.train_dataset
    torch.manual_seed(0)
    trainer._step, inputs = 0, [data[i] for i in range(4) for _ in range(4)]
    batches = [trainer._prepare_inputs(inputs)]
    trainer._step = 1
    batches.append(trainer._prepare_inputs(inputs))
    by_text = {f"Riddle {i}?": data[i] for i in range(4)}
    for batch in batches:
        forward = {k: v for k, v in batch.items() if k in KNOWN}
        trainer._further = {k.removeprefix(FURTHER): v for k, v in batch.items() if k.startswith(FURTHER)}
        ids, mask = (torch.cat([batch[f"prompt_{x}"], batch[f"completion_{x}"]], 1) for x in ("ids", "mask"))
        width = batch["completion_ids"].shape[1]
        logps, _, _ = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, width, **forward)
        hidden = trainer.teacher.hidden_states(batch, range(len(ids)))
        head = trainer.teacher.head
        bias = 0 if head.bias is None else head.bias
        of_teacher = (hidden @ head.weight.T + bias).log_softmax(-1)
        for row in range(len(ids)):
            prompt = trainer._tokenizer.decode(batch["prompt_ids"][row], skip_special_tokens=True)
            own = next(data_row for text, data_row in by_text.items() if text in prompt)
            said = batch["completion_ids"][row][batch["completion_mask"][row].bool()].tolist()
            want = (alone(trainer.model, trainer.processing_class, own, said) / 0.7).log_softmax(-1)
            want = want.gather(1, torch.tensor(said)[:, None])[:, 0]
            assert torch.allclose(logps[row, : len(said)], want, atol=1e-4), (name, kind, row)
            want = alone(trainer.teacher.model, trainer.teacher.processor, own, said)
            assert torch.allclose(of_teacher[row, : len(said)], want, atol=1e-4), (name, kind, row)


KNOWN = ("pixel_values", "image_grid_thw", "num_images", "num_tiles", "pixel_attention_mask", "image_sizes",
         "token_type_ids", "mm_token_type_ids")  # fmt: skip


@pytest.mark.parametrize("name", ["llava-next", "internvl", "llava-onevision"])
def test_pictures_of_several_shapes_are_cut_into_as_many_pieces_as_they_need(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shapes = itertools.cycle([(16, 64), (64, 16), (64, 64), (20, 20)])
    plain = picture
    monkeypatch.setitem(
        globals(), "picture", lambda colour: SimpleNamespace(resize=lambda _: plain(colour).resize(next(shapes)))
    )
    test_student_and_teacher_see_each_row_with_its_own_pictures(tmp_path, name, "mixed")


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "qwen3"])
def test_micro_batches_without_a_picture_among_some_with(tmp_path: Path, name: str) -> None:
    """A row each: some have none. GRPOTrainer alone gives the model an empty batch of pictures, and it fails."""
    small = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "num_iterations": 2}
    trainer = make(tmp_path, name, "some", max_steps=1, **small)
    trainer.train()
    assert {sum(batch["num_images"]) for batch in trainer._buffered_inputs} == {0, 1}
    assert trainer.state.log_history[0]["kepo/divergence"] > 0


def test_two_processes_would_wait_for_one_another_where_a_batch_has_no_picture(tmp_path: Path) -> None:
    trainer = make(tmp_path, "qwen3-vl", "some", per_device_train_batch_size=2, gradient_accumulation_steps=8)
    check_pictured([1, 0, 0, 1], 2)
    with pytest.raises(ValueError, match="a batch of 2 rows on one of several processes has no picture"):
        check_pictured([1, 1, 0, 0], 2)
    assert trainer.accelerator.num_processes == 1


# What processors make, and which row it belongs to -----------------------------------------------------------------


def images(*counts: int) -> list[list[int]]:
    return [list(range(count)) for count in counts]


@pytest.mark.parametrize(
    ("counts", "entries", "rows"),
    [
        ((1, 1, 1), 3, [1, 1, 1]),
        ((2, 0, 2), 4, [2, 0, 2]),  # per picture
        ((2, 0, 2), 2, [1, 0, 1]),  # per row with pictures
        ((2, 0, 2), 3, [1, 1, 1]),  # per row
        ((3, 1, 0, 0), 4, [3, 1, 0, 0]),  # per picture or row: the row with three of its own decides
    ],
)
def test_an_input_is_split_by_pictures_or_by_rows(counts: Any, entries: int, rows: list[int]) -> None:
    value = torch.arange(entries)
    split = by_row("sizes", value, images(*counts), lambda images: {"sizes": images})
    assert [len(part) for part in split] == rows and torch.equal(torch.cat(split), value)


@pytest.mark.parametrize(("counts", "entries"), [((1, 2, 1), 7), ((2, 0), 2)])
def test_an_input_that_cannot_be_split_is_refused_by_name(counts: Any, entries: int) -> None:
    with pytest.raises(ValueError, match=f"makes {entries} entries of masks for .* rows could get the inputs"):
        by_row("masks", torch.arange(entries), images(*counts), lambda images: {})


def test_types_of_tokens_stand_beside_their_tokens_whatever_their_name() -> None:
    """ERNIE 4.5 has ``moe_mm_token_type_ids``, of which GRPOTrainer knows nothing."""
    rows = further_inputs({"moe_mm_token_type_ids": [[0, 1, 1], [1]]}, images(1, 1), None)
    types = beside_tokens(rows, prompt=4, completion=2)["moe_mm_token_type_ids"]
    assert torch.cat(list(types)).tolist() == [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 0, 0]]


class _Mllama(torch.nn.Module):
    def forward(self, pixel_values: Any, aspect_ratio_ids: Any, cross_attention_mask: Any, image_pixels: Any) -> None:
        """What Llama 3.2 Vision takes (and Phi-4's name for pixels)."""


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"pixel_values": [1], "crops": [1]}, "makes crops, which _Mllama does not take"),
        ({"image_pixels": [1]}, "makes image_pixels but no pixel_values: GRPOTrainer cannot train _Mllama"),
        (
            {"pixel_values": [1], "cross_attention_mask": torch.ones(1, 3, 1, 4)},
            "makes cross_attention_mask, an entry per token of the prompt",
        ),
        ({"pixel_values": torch.ones(5, 3, 2, 2)}, "_Mllama cuts pictures into tiles but does not return num_patches"),
        ({"pixel_values": torch.ones(1, 3, 2, 2), "aspect_ratio_ids": torch.ones(1, 3, dtype=int)}, None),
    ],
)
def test_a_model_whose_inputs_cannot_all_arrive_is_refused_by_name(fields: Any, sentence: str | None) -> None:
    ids = [[1, 2, 3]] if sentence else [[1, 2, 3, 4]]

    def check() -> None:
        check_inputs(fields, ids, images(1), lambda images, crop_to_patches: {"pixel_values": images}, _Mllama())

    if sentence is None:
        check()
        return
    with pytest.raises(ValueError, match=sentence):
        check()


def test_a_model_is_refused_before_anything_is_generated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, processor = build("video-llama3")
    processors = type(processor.image_processor)
    made = processors.__call__
    monkeypatch.setattr(processors, "__call__", lambda self, *a, **k: made(self, *a, **k) | {"crops": [1]})
    with pytest.raises(ValueError, match="makes crops, which VideoLlama3ForConditionalGeneration does not take"):
        make(tmp_path, "video-llama3", "one")


def test_a_teacher_that_lacks_an_input_of_the_students_is_refused_by_name() -> None:
    student, processor = build("video-llama3")
    teacher, _ = build("qwen2.5-vl")
    with pytest.raises(ValueError, match=r"image_merge_sizes, which the teacher \(Qwen2_5_VLFor"):
        Teacher(teacher, processor).check_fits(student, processor, ["pixel_values", "image_merge_sizes"])
    other = build("qwen2.5-vl")[1]
    with pytest.raises(ValueError, match="the teacher's model_input_names is"):
        Teacher(teacher, other).check_fits(student, processor)


def test_a_batch_without_pictures_of_a_column_of_none_is_text(tmp_path: Path) -> None:
    trainer = make(tmp_path, "qwen3-vl", "text", max_steps=1)
    trainer.train_dataset = trainer.train_dataset.add_column("image", [None] * 4)
    trainer.train()
    assert "pixel_values" not in trainer._buffered_inputs[0]


def test_old_and_reference_log_probabilities_of_a_model_with_an_input_that_trl_does_not_know(tmp_path: Path) -> None:
    """LLaVA-OneVision's processor counts the pictures of each row; GRPOTrainer alone fails over that."""
    trainer = make(tmp_path, "llava-onevision", "two", num_iterations=2)
    trainer.train()
    assert trainer.state.log_history[0]["kepo/divergence"] > 0
