"""That schooling is reproducible, goes on where it was cut off, and what is measured of its pupils."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kepo_core.analysis.statistics import accuracy_table
from kepo_core.data import phantom
from kepo_core.data.records import LETTERS, MODALITIES, Answer, AnswerOutcome, Question
from kepo_core.testbed import school, zero_shot
from kepo_core.testbed.calibration import prior, question_clues
from kepo_core.testbed.embedded import build_model
from kepo_core.testbed.lessons import Pool, Tasks
from kepo_core.testbed.pretraining import Kept, Muon, train_language
from kepo_core.testbed.school import Lessons, teach

TINY = Lessons(
    64, 3, ((2, {"lookup": 4}), (3, {"ticked": 4, "atlas": 2, "plain": 4, "think": 4, "hint": 4, "aware": 4}))
)


def test_muon_is_torchs_but_for_the_rounding_of_its_bfloat16() -> None:
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 10), (9, 4))]
    theirs = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    pair = Muon(ours, lr=0.02, weight_decay=0.01), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.01)
    for _ in range(20):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = other.grad = torch.randn_like(one)
        for optimizer in pair:
            optimizer.step()
    assert all((one - other).abs().max() < 0.01 * 20 * 0.02 for one, other in zip(ours, theirs, strict=True))


def test_schooling_goes_on_where_it_was_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def quiet(text: str) -> None: ...

    teach("student", 1, tmp_path / "whole", TINY, quiet, every=2)
    draw, mirrored, calls = Tasks.draw, Pool.mirrored, Counter()

    def cut_off(name: str, at: int, usual):
        def now(self, *arguments):
            calls[name] += 1
            if calls[name] == at:
                raise KeyboardInterrupt
            return usual(self, *arguments)

        return now

    monkeypatch.setattr(Pool, "mirrored", cut_off("vision", 3, mirrored))
    monkeypatch.setattr(Tasks, "draw", cut_off("language", 10, draw))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)  # on however many cores
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            teach("student", 1, tmp_path / "cut", TINY, quiet, every=2)
    teach("student", 1, tmp_path / "cut", TINY, quiet, every=2)
    assert torch.get_num_threads() == 3
    torch.set_num_threads(threads)
    assert calls["vision"] == 5  # two steps were kept: the third was cut off, made, and made again
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == two


def test_the_vision_tower_is_left_alone_once_it_is_taught(processor, tmp_path: Path) -> None:
    model = build_model("small", 0)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    tasks = Tasks(processor, Pool.draw(processor, 16, 3), np.random.default_rng(0), 1.2)
    train_language(model, tasks, ((1, {"think": 2}),), lambda text: None, Kept(tmp_path / "kept.pt", 10))
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, before[name])}
    assert "lm_head.weight" in changed and not any("visual" in name for name in changed)
    assert all(weight.requires_grad for weight in model.parameters())


def test_pupils_and_seeds_share_no_weights_and_differ_in_size(tmp_path: Path) -> None:
    once = Lessons(16, 1, ((1, {"plain": 2}),))
    weights = {}
    for pupil, seed in (("student", 0), ("student", 1), ("middle", 0), ("teacher", 0)):
        teach(pupil, seed, tmp_path / f"{pupil}{seed}", once, lambda text: None)
        weights[pupil, seed] = load_file(tmp_path / f"{pupil}{seed}" / "model.safetensors")
    sizes = {key: sum(w.numel() for w in found.values()) for key, found in weights.items()}
    assert 1.1e6 < sizes["student", 0] < 1.3e6 < sizes["middle", 0] and sizes["teacher", 0] > 4 * sizes["student", 0]
    first, second = weights["student", 0], weights["student", 1]
    assert not any((first[n] == second[n]).all() for n in first if first[n].dim() > 1)


def test_lessons_are_the_same_for_all_but_for_their_length() -> None:
    once, twice = Lessons(), Lessons().times(2)
    assert twice.vision_steps == 2 * once.vision_steps
    assert [(steps // 2, mixture) for steps, mixture in twice.phases] == list(once.phases)
    assert min(steps for steps, _ in Lessons().times(0.0001).phases) == 1


def asked(count: int, seed: int) -> list[Question]:
    rng, found = np.random.default_rng(seed), []
    for i in range(count):
        modality = str(rng.choice(MODALITIES))
        a = phantom.ask(rng, phantom.draw_facts(rng, modality), phantom.draw_topics(rng, 1)[0])
        found.append(Question(f"q{i}", "d", modality, "t", a.question, a.options, a.answer, Path("x.png")))
    return found


def test_questions_say_nothing_by_their_text() -> None:
    measured = prior("question only", asked(8000, 0), asked(8000, 1), question_clues)
    assert measured.met and measured.low < 0.01


def answers(right: dict[str, float], count: int = 100) -> list[Answer]:
    return [
        Answer(f"{m}{i}", m, "t", "", AnswerOutcome.CORRECT, LETTERS[i % 2], i < share * count, True, 5, True)
        for m, share in right.items() for i in range(count)
    ]  # fmt: skip


def test_levels_are_judged_by_the_papers_own_row() -> None:
    paper = zero_shot.paper_table().loc[("Qwen3-VL", "2B", "thinking")]
    near = {m: round(float(paper[m])) / 100 for m in MODALITIES}
    far = {m: near[m] - 0.1 for m in MODALITIES}
    for right, met in ((near, True), (far, False)):
        found = zero_shot.levels(accuracy_table({"student, thinking": answers(right)}, None, "MRI"))
        assert [m.what for m in found] == [
            "student, thinking, Avg.",
            "student, thinking, MRI",
            "student, thinking, spread",
        ]
        assert [m.met for m in found] == [met, met, True]
    flat = accuracy_table({"student, thinking": answers(dict.fromkeys(MODALITIES, 0.67))}, None, "MRI")
    assert [m.met for m in zero_shot.levels(flat)] == [True, True, False]


def test_errors_overlap_as_much_as_they_do() -> None:
    half = answers({"MRI": 0.5})
    table = zero_shot.overlap({"student, thinking": half, "teacher, thinking": half})
    assert table.loc["student and teacher"].tolist() == [50.0, 25.0, 100.0]
    assert school.PUPILS.keys() == zero_shot.SIZES.keys()
