"""Version 4's lessons: what they teach, how far they get, and that schooling goes on where it was cut off."""

import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

from kepo_core.analysis.statistics import accuracy_table
from kepo_core.data import phantom
from kepo_core.data.phantom import Facts
from kepo_core.data.records import LETTERS, MODALITIES, Answer, AnswerOutcome, Question
from kepo_core.params import Params
from kepo_core.testbed import school, zero_shot
from kepo_core.testbed.calibration import prior, question_clues
from kepo_core.testbed.lessons import BASICS, BOOKS, PACE, Pool, Tasks, taught
from kepo_core.testbed.school import Lessons, teach

LENGTH = 1.2
TOPICS = {topic.name: topic for topic in phantom.TOPICS}
TINY = Lessons(
    64, 3, ((2, {"lookup": 4}), (3, {"ticked": 4, "atlas": 2, "plain": 4, "think": 4, "hint": 4, "aware": 4}))
)


def every(modality: str, version: str = "4") -> list[Facts]:
    return [
        Facts(modality, kind, "upper left", size, number, contrast, version)
        for kind in phantom.KINDS for contrast in phantom.CONTRASTS
        for size in phantom.SIZES for number in phantom.NUMBERS
    ]  # fmt: skip


@pytest.mark.parametrize("topic", ["diagnosis", "grade"])
def test_a_longer_school_gets_further_down_the_same_list_of_meanings(topic: str) -> None:
    size = {"diagnosis": 8, "grade": 4}[topic]
    for modality in MODALITIES:
        reached = [
            {getattr(f, topic) + f.kind * (topic == "diagnosis") + f.contrast * (topic == "diagnosis")
             for f in every(modality) if taught(f, TOPICS[topic], length)}
            for length in (0.0, 1.2, 1.3, 20.0)
        ]  # fmt: skip
        assert all(shorter <= longer for shorter, longer in pairwise(reached))
        shares = [PACE[modality] * (length - BASICS) for length in (1.2, 1.3)]
        assert [len(names) for names in reached] == [1, *(max(1, round(size * share)) for share in shares), size]


def test_what_is_seen_and_all_of_version_3_is_always_taught() -> None:
    assert all(taught(f, t, 0.0) for m in MODALITIES for f in every(m, "3") for t in phantom.TOPICS)
    assert all(taught(f, t, 0.0) for m in MODALITIES for f in every(m) for t in phantom.TOPICS if t.level < 3)


def tasks_on(processor, facts: list[Facts], seed: int = 0) -> Tasks:
    pictures = [phantom.picture(np.random.default_rng(i), f) for i, f in enumerate(facts)]
    pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"].view(len(facts), 64, -1)
    return Tasks(processor, Pool(pixels.half(), facts), BOOKS, np.random.default_rng(seed), LENGTH)


def read(processor, batch) -> list[tuple[str, str]]:
    """(prompt, what is learned) of every sequence."""
    decode = processor.tokenizer.decode
    return [
        (decode(ids[(weight == 0) & (mask > 0)]), decode(ids[weight > 0]))
        for ids, mask, weight in zip(batch.input_ids, batch.attention_mask, batch.labels_weight, strict=True)
    ]


def test_what_is_not_taught_is_asked_where_the_answer_is_told_alone(processor) -> None:
    known, unknown = (
        next(f for f in every("MRI") if taught(f, TOPICS["diagnosis"], LENGTH) == known) for known in (True, False)
    )
    asked = {}
    for facts in (known, unknown):
        for task in ("plain", "think", "aware", "hint"):
            pairs = read(processor, tasks_on(processor, [facts]).draw(task, 100))
            asked[facts, task] = sum("diagnosis?" in p or "condition" in p for p, _ in pairs)
    assert all((count > 10) == (facts == known or task in ("aware", "hint")) for (facts, task), count in asked.items())


def test_right_words_of_a_list_are_ticked_and_only_what_stands_behind_words_is_learned(processor) -> None:
    facts = every("X-Ray")
    batch = tasks_on(processor, facts).draw("ticked", 60)
    for ids, mask, weight in zip(batch.input_ids, batch.attention_mask, batch.labels_weight, strict=True):
        text = processor.tokenizer.decode(ids[mask > 0])
        lines = text.split("assistant\n")[1].removesuffix("<|im_end|>").splitlines()
        ticked = {line[3:-4]: line[0] == line[-2] for line in lines if line.endswith(")")}
        plain = {line[3:] for line in lines if not line.endswith(")")}
        assert len(ticked) == len(plain) == 4 and all(ticked.values())
        assert any(ticked.keys() <= set(f.words.values()) and not plain & set(f.words.values()) for f in facts)
        learned = processor.tokenizer.decode(ids[weight > 0])
        assert learned.count("(") == 4 and not any(word in learned for word in (*ticked, *plain))


def test_an_atlas_says_what_findings_mean_in_one_modality_and_only_that_is_learned(processor) -> None:
    facts = every("OCT")
    named = Counter()
    batch = tasks_on(processor, facts).draw("atlas", 60)
    assert batch.pixels is None
    for prompt, learned in read(processor, batch):
        assert "This looks like OCT." in prompt and len(re.findall(r"means", prompt)) == 6
        assert not re.sub(
            "|".join(sorted((*phantom.GRADES, *phantom.DIAGNOSES), key=len, reverse=True)), "", learned
        ).strip()
    for ids, mask in zip(batch.input_ids, batch.attention_mask, strict=True):
        text = processor.tokenizer.decode(ids[mask > 0])
        for contrast, kind, name in re.findall(r"A (\w+) (\w+) means (\w+)\.", text):
            assert name == Facts("OCT", kind, "upper left", "small", "one", contrast, "4").diagnosis
            named[kind, contrast] += 1
    assert set(named) == {(f.kind, f.contrast) for f in facts if taught(f, TOPICS["diagnosis"], LENGTH)}
    assert named.total() > 60


@pytest.mark.parametrize(("reached", "often"), [(True, 0.6), (False, 0.3)])
def test_what_is_told_counts_whether_it_is_so_or_not(processor, reached: bool, often: float) -> None:
    """A hint's meaning is random in half of the lessons if it is taught, and in all of them if it is not."""
    facts = next(f for f in every("Fundus") if taught(f, TOPICS["diagnosis"], LENGTH) == reached)
    true = []
    for prompt, learned in read(processor, tasks_on(processor, [facts]).draw("aware", 400)):
        if found := re.search(rf"<hint>\w \w+\. A {facts.contrast} {facts.kind} means (\w+)\.</hint>", prompt):
            name = found[1]
            assert f"means {name}" in learned
            options = dict(re.findall(r"(\w)\) (\w+)\n", prompt))
            assert options[re.findall(r"\((\w)\)", learned)[-1]] == name
            true.append(name == facts.diagnosis)
    assert len(true) > 40 and np.mean(true) == pytest.approx(often, abs=0.15)


def test_hints_say_what_a_finding_means_by_the_answer_that_is_given(processor) -> None:
    facts = every("Fundus")[0]
    written = [said for _, said in read(processor, tasks_on(processor, [facts]).draw("hint", 60))]
    assert any(
        re.fullmatch(rf"<hint>(\w) (\w+)\. A {facts.contrast} {facts.kind} means \2\.</hint><\|im_end\|>", t)
        for t in written
    )


def test_what_is_taught_fits_into_a_runs_longest_completion_and_hint(processor) -> None:
    params, tasks = Params(), tasks_on(processor, [f for m in MODALITIES for f in every(m)])
    longest = {"think": params.of_trl("max_completion_length"), "aware": params.eval_max_tokens,
               "hint": params.hint_max_tokens}  # fmt: skip
    for task, most in longest.items():
        assert (tasks.draw(task, 300).labels_weight > 0).sum(1).max() <= most


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
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            teach("student", 1, tmp_path / "cut", TINY, quiet, every=2)
    teach("student", 1, tmp_path / "cut", TINY, quiet, every=2)
    assert calls["vision"] == 5  # two steps were kept: the third was cut off, made, and made again
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "cut"))
    assert one == two


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
        a = phantom.ask(rng, phantom.draw_facts(rng, modality, "4"), phantom.draw_topics(rng, 1)[0])
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
