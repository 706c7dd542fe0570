"""A run as a folder for the Hub: it loads, it says what it is and how sure, and it gives no machine away."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from kepo_core.analysis import answers
from kepo_core.cli import main
from kepo_core.data.records import MODALITIES, Answer, AnswerOutcome
from kepo_core.errors import ParamError
from kepo_core.experiment.models import load_model, load_processor
from kepo_core.pages.export import as_markdown, describe, export, portable
from kepo_core.params import Params
from kepo_core.runs.run import Run
from kepo_core.testbed.embedded import build_model, build_processor

DATA = {"train_items": 7, "test_items_whose_image_is_trained_on": 3, "train_sha256": "aa11", "test_sha256": "bb22"}


def answered(right: Callable[[int], bool]) -> list[Answer]:
    """Ten questions per modality."""
    return [
        Answer(
            question_id=f"{modality}-{i}", modality=modality, question_type="Other", completion="x",
            outcome=AnswerOutcome.CORRECT if right(i) else AnswerOutcome.WRONG, letter="A", correct=right(i),
            format_ok=True, tokens=3, finished=True, sample=0,
        )
        for modality in MODALITIES for i in range(10)
    ]  # fmt: skip


def made(folder: Path, model: bool = True, end: Any = "completed", **changes: Any) -> Run:
    """A run folder as it is left, with a small model in it."""
    run = Run.allocate(Params.load(overrides={"results_dir": str(folder / "results"), **changes}))
    run.remember(data=DATA, notebook=str(folder / "secret/mine.ipynb"), hardware={"gpus": ["A GPU"]})
    given = {"untrained": answered(lambda i: i < 5), run.method: answered(lambda i: i < 8)}
    run.write_table("predictions", answers.to_table(given))
    if model:
        build_model("test", 0).save_pretrained(run.path / "model", max_shard_size="200KB")
        build_processor().save_pretrained(run.path / "model")
        torch.save({}, run.path / "model/training_args.bin")
    (run.path / "figures").mkdir()
    (run.path / "figures/accuracy.png").write_bytes(b"png")
    run.finish({"steps": 75})
    if end != "completed":
        run.conclude(end)
    return run


def test_the_folder_loads_and_holds_no_pickle_and_no_machine(tmp_path: Path) -> None:
    absolute = {"data_root": "/disks/private/Omni.zip", "student": str(tmp_path / "secret/student")}
    run = made(tmp_path, **absolute, teacher_url="http://10.0.0.7:8000/v1", teacher_top_k=20)
    folder = export(run, tmp_path / "hub")
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert {"README.md", "params.yaml", "figures/accuracy.png", "config.json", "model.safetensors.index.json"} <= files
    taken = (".safetensors", ".json", ".jinja", ".yaml", ".md", ".png")
    assert not [name for name in files if not name.endswith(taken)]
    weights = load_model(str(folder)).state_dict()
    assert all(torch.equal(value, weights[name].cpu()) for name, value in build_model("test", 0).state_dict().items())
    assert load_processor(str(folder)).chat_template == build_processor().chat_template
    for name in files:
        if not name.endswith((".safetensors", ".png")):
            text = (folder / name).read_text()
            for secret in ("/disks", "private", "secret", str(tmp_path), "10.0.0.7", "ImageOnly"):
                assert secret not in text, (name, secret)
    again = Params.load(folder / "params.yaml")
    assert again.data_root == "PATH/TO/Omni.zip" and again.teacher_url == "http://HOST:8000/v1"
    assert again.replace(**{n: getattr(run.params, n) for n in (*absolute, "teacher_url")}).hash == run.params.hash


def test_the_processor_is_named_as_transformers_knows_it(tmp_path: Path) -> None:
    """Under this package's name ``AutoProcessor`` would return a bare tokenizer without a word."""
    folder = export(made(tmp_path), tmp_path / "hub")
    names = ("processor_config.json", "tokenizer_config.json", "preprocessor_config.json")
    processor, tokenizer, images = (json.loads((folder / name).read_text()) for name in names)
    assert processor["processor_class"] == tokenizer["processor_class"] == "Qwen3VLProcessor"
    assert images == processor["image_processor"] and images["patch_size"] == 8


def test_the_card_has_method_data_results_and_how_to_repeat_it(tmp_path: Path) -> None:
    run = made(tmp_path)
    card = ModelCard.load(export(run, tmp_path / "hub") / "README.md")
    head, text = card.data.to_dict(), " ".join(card.text.split())
    assert (head["library_name"], head["pipeline_tag"], head["license"]) == (
        "transformers", "image-text-to-text", "apache-2.0")  # fmt: skip
    found = {r.dataset_config: r.metric_value for r in card.data.eval_results}
    assert found == {"MRI": 0.8, "Avg.": 0.8, "Avg. (OOD)": 0.8}
    assert "GRPO with distillation from a teacher on rollouts whose accuracy reward is at least 1, and further" in text
    assert "80 questions, greedy answers" in text and "It was trained on MRI only" in text
    assert "| MRI | 50.0 [23.7, 76.3] | 80.0 [49.0, 94.3] | +30.0 [" in text
    assert "intervals may be too narrow" in text  # there is no items.csv, which says who shares a picture
    assert "PhantomVQA: 7 training questions of MRI" in text and "trained on: 3" in text and "`aa11`" in text
    assert f"commit `{run.provenance['code']['commit']}`" in text and "kepo run mine.ipynb -f params.yaml" in text
    assert "75 optimiser steps, A GPU" in text and "| torch |" in text and "![accuracy](figures/accuracy.png)" in text
    assert "enclose your reasoning process in <think>...</think> tags." in text and "&" not in text.replace("&amp;", "")


def test_a_hub_model_is_named_as_the_base_and_keeps_its_licence(tmp_path: Path) -> None:
    run = made(tmp_path, student="Qwen/Qwen3-VL-2B-Instruct", data_root="phantom")
    card = ModelCard.load(export(run, tmp_path / "hub") / "README.md")
    assert card.data.base_model == "Qwen/Qwen3-VL-2B-Instruct" and card.data.license is None
    assert "Its licence is that of the model it was trained from" in card.text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill": False, "explore": False}, "reinforcement learning: GRPO."),
        ({"explore": False, "gate": "below"}, "whose accuracy reward is below 1."),
        ({"explore": False, "gate": "teacher"}, "on rollouts of prompts that the teacher itself answers right."),
        ({"explore": False, "guidance": "bounded"}, "whose accuracy reward is at least 1, in the advantage."),
        ({"distill": False, "hint_context": "none"}, "for up to 5 rounds, of the same prompt where all 8"),
        ({"distill": False, "hint_context": "fading"}, "with a teacher's hint and the answer at first, later with the"),
        ({"method": "sft", "thinking": False}, "fine-tuned on right answers"),
        ({"method": "gkd", "gkd_lambda": 1.0}, "MM-GKD (λ = 1)"),
    ],
)
def test_each_method_is_described(changes: dict[str, Any], words: str) -> None:
    assert words in describe(Params(**changes))


def test_nothing_half_done_is_left_and_nothing_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = made(tmp_path)
    (tmp_path / "there").mkdir()
    with pytest.raises(ParamError, match="there exists already and is not overwritten"):
        export(run, tmp_path / "there")
    monkeypatch.setattr("kepo_core.pages.export.model_card", lambda run: (_ for _ in ()).throw(OSError(28, "No space")))
    with pytest.raises(ParamError, match="hub cannot be written: No space"):
        export(run, tmp_path / "hub")
    assert {path.name for path in tmp_path.iterdir()} == {"results", "there"}


@pytest.mark.parametrize(
    ("kind", "sentence"),
    [({"end": "failed"}, "is failed, expected a completed run"), ({"model": False}, "has no trained model")],
)
def test_a_run_that_has_nothing_to_show_is_refused(tmp_path: Path, kind: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ParamError, match=sentence):
        export(made(tmp_path, **kind), tmp_path / "hub")


def test_the_command_exports_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = made(tmp_path)
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["export", str(run.path), "hub"]) == 0 and (elsewhere / "hub/config.json").is_file()
    assert "nothing was uploaded: `hf upload OWNER/NAME hub` does it" in capsys.readouterr().out
    assert main(["export", str(run.path)]) == 0 and (run.path / "export/README.md").is_file()
    assert main(["export", str(run.path)]) == 2


def test_a_cell_is_text() -> None:
    table = pd.DataFrame({"a|b": ["<b>1</b>"]}, index=["x | y"])
    assert as_markdown(table).splitlines()[0] == "|  | a&#124;b |"
    assert as_markdown(table).splitlines()[2] == "| x &#124; y | &lt;b&gt;1&lt;/b&gt; |"


def test_portable_parameters_keep_everything_else() -> None:
    params = Params(tau=0.5, items_file="/x/y/items.csv", results_dir="/x/results")
    assert portable(params) == Params(tau=0.5, items_file="PATH/TO/items.csv")
    assert yaml.safe_load(portable(params).to_yaml())["student"] == "embedded:student"
