"""What the embedded models are taught to say, and how far their lessons get."""

import hashlib
import re
import zlib
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kepo_core.data import phantom
from kepo_core.data.phantom import Asked, Facts
from kepo_core.data.records import MODALITIES
from kepo_core.params import Params
from kepo_core.task.rewards import score
from kepo_core.testbed.lessons import BASICS, LETTER_WEIGHT, PACE, Pool, Tasks, careful, fact_labels, sloppy, taught

LENGTH = 1.2
TOPICS = {topic.name: topic for topic in phantom.TOPICS}


def every(modality: str) -> list[Facts]:
    return [
        Facts(modality, kind, "upper left", size, number, contrast)
        for kind in phantom.KINDS for contrast in phantom.CONTRASTS
        for size in phantom.SIZES for number in phantom.NUMBERS
    ]  # fmt: skip


def drawn(count: int, seed: int = 0) -> list[Asked]:
    rng = np.random.default_rng(seed)
    return [phantom.ask(rng, phantom.draw_facts(rng, "OCT"), phantom.draw_topics(rng, 1)[0]) for _ in range(count)]


def judged(text: str, asked: Asked):
    return score(text, asked.answer, asked.options, thinking=True, finished=True)


def test_careful_answers_are_right_and_sloppy_ones_break_the_format_only() -> None:
    rng = np.random.default_rng(0)
    asked = drawn(300)
    assert all(judged(careful(a), a).accuracy == judged(careful(a), a).format_ok == 1 for a in asked)
    broken = [judged(sloppy(a, rng), a) for a in asked]
    assert not any(s.format_ok for s in broken) and 0.2 < np.mean([s.accuracy for s in broken]) < 0.5


def test_mirrored_pictures_keep_their_facts(processor) -> None:
    rng = np.random.default_rng(0)
    facts = [Facts("Fundus", "disc", place, "large", "one", "bright") for place in phantom.PLACES]
    pictures = [phantom.picture(rng, f) for f in facts]
    values = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"].view(4, 64, -1)
    pool, seen = Pool(values.half(), facts), set()
    for _ in range(20):
        pixels, moved = pool.mirrored([0, 1, 2, 3], rng)
        # Patches: 4×4 blocks of 2×2, 3 channels of 8×8.
        whole = pixels.view(4, 4, 4, 2, 2, 3, 8, 8).permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(4, 3, 64, 64).mean(1)
        quadrants = whole.view(4, 2, 32, 2, 32).amax((2, 4)).view(4, 4).argmax(-1)
        assert [phantom.PLACES[q] for q in quadrants] == [f.place for f in moved]
        seen.add(moved[0].place)
    assert seen == set(phantom.PLACES)


def test_pretraining_sees_no_picture_of_the_set(tmp_path: Path, processor) -> None:
    phantom.write_phantom(tmp_path, seed=5, images=dict.fromkeys(MODALITIES, 6))
    pool = Pool.draw(processor, 400, seed=5)
    seen = {zlib.crc32(p.numpy().tobytes()) for p in pool.pixels}
    pictures = [Image.open(p).convert("RGB") for p in sorted(tmp_path.rglob("*.png"))]
    written = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"].view(48, 64, -1)
    assert not seen & {zlib.crc32(p.numpy().tobytes()) for p in written.half()}
    assert len(seen) == 400


def test_fact_labels_are_indices_of_words() -> None:
    labels = fact_labels([Facts("CT", "cross", "lower left", "large", "two", "dark")])
    assert {k: v.item() for k, v in labels.items()} == {
        "modality": 1, "kind": 3, "place": 2, "size": 1, "number": 1, "contrast": 1,
    }  # fmt: skip


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


def test_what_is_seen_is_always_taught() -> None:
    assert all(taught(f, t, 0.0) for m in MODALITIES for f in every(m) for t in phantom.TOPICS if t.level < 3)


def tasks_on(processor, facts: list[Facts], seed: int = 0) -> Tasks:
    pictures = [phantom.picture(np.random.default_rng(i), f) for i, f in enumerate(facts)]
    pixels = processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"].view(len(facts), 64, -1)
    return Tasks(processor, Pool(pixels.half(), facts), np.random.default_rng(seed), LENGTH)


def read(processor, batch) -> list[tuple[str, str]]:
    """(prompt, what is learned) of every sequence."""
    decode = processor.tokenizer.decode
    return [
        (decode(ids[(weight == 0) & (mask > 0)]), decode(ids[weight > 0]))
        for ids, mask, weight in zip(batch.input_ids, batch.attention_mask, batch.labels_weight, strict=True)
    ]


@pytest.fixture(scope="module")
def tasks(processor) -> Tasks:
    return Tasks(processor, Pool.draw(processor, 40, 3), np.random.default_rng(0), LENGTH)


def test_only_completions_are_learned_and_letters_weigh_more(processor, tasks: Tasks) -> None:
    batch = tasks.draw("think", 8)
    for ids, mask, weight in zip(batch.input_ids, batch.attention_mask, batch.labels_weight, strict=True):
        start = int((weight > 0).nonzero()[0])
        assert processor.tokenizer.decode(ids[:start]).endswith("assistant\n")
        assert ((weight > 0)[start:] == mask[start:].bool()).all() and not weight[mask == 0].any()
        assert sorted(set(weight.tolist())) == [0, 1, LETTER_WEIGHT] and (weight == LETTER_WEIGHT).sum() == 1
    assert batch.pixels is not None and batch.pixels.shape == (8, 64, 192)


def test_the_lessons_are_those_that_the_shipped_models_had(processor) -> None:
    """Other draws, and notebook 00 no longer rebuilds the shipped models."""
    tasks, digest = Tasks(processor, Pool.draw(processor, 40, 3), np.random.default_rng(0), LENGTH), hashlib.sha256()
    for task in ("lookup", "named", "caption", "ticked", "atlas", "plain", "think", "hint", "aware"):
        batch = tasks.draw(task, 20)
        digest.update(batch.input_ids.numpy().tobytes() + batch.labels_weight.numpy().tobytes())
    assert digest.hexdigest()[:16] == "fced669d570ec797"


def test_one_thinking_answer_in_ten_breaks_the_format(processor, tasks: Tasks) -> None:
    said = [learned for _, learned in read(processor, tasks.draw("think", 400))]
    broken = [not (t.startswith("<think>") and "</think>\n<answer>" in t and "</answer>" in t) for t in said]
    assert np.mean(broken) == pytest.approx(0.1, abs=0.05)


def test_lookups_are_right_and_need_no_picture(processor, tasks: Tasks) -> None:
    batch = tasks.draw("lookup", 50)
    assert batch.pixels is None
    for ids, weight in zip(batch.input_ids, batch.labels_weight, strict=True):
        listed = processor.tokenizer.decode(ids[weight == 0]).split("user\n")[1].split("<|im_end|>")[0]
        options = {word: letter for letter, word in (line.split(") ") for line in listed.splitlines())}
        named = processor.tokenizer.decode(ids[weight > 0]).removesuffix("<|im_end|>").strip(" .").split(").")
        found = [part.strip(" )").split(" (") for part in named]
        assert len(found) == len(options) and all(options[word] == letter for word, letter in found)


def test_what_is_not_taught_is_asked_where_the_answer_is_told_alone(processor) -> None:
    known, unknown = (
        next(f for f in every("MRI") if taught(f, TOPICS["diagnosis"], LENGTH) == known) for known in (True, False)
    )
    asked = {}
    for facts in (known, unknown):
        for task in ("plain", "think", "aware", "hint"):
            pairs = read(processor, tasks_on(processor, [facts]).draw(task, 100))
            asked[facts, task] = sum("diagnosis?" in p or "condition" in p for p, _ in pairs)
    assert all((count > 10) == (facts == known or task == "hint") for (facts, task), count in asked.items())


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
            assert name == Facts("OCT", kind, "upper left", "small", "one", contrast).diagnosis
            named[kind, contrast] += 1
    assert set(named) == {(f.kind, f.contrast) for f in facts if taught(f, TOPICS["diagnosis"], LENGTH)}
    assert named.total() > 60


@pytest.mark.parametrize(("reached", "often"), [(True, 0.6), (False, 0.3)])
def test_the_answer_that_hints_are_written_from_is_right_at_times(processor, reached: bool, often: float) -> None:
    """It is random in half of the lessons if it is taught, and in all of them if it is not."""
    facts = next(f for f in every("Fundus") if taught(f, TOPICS["diagnosis"], LENGTH) == reached)
    true = []
    for _, learned in read(processor, tasks_on(processor, [facts]).draw("hint", 400)):
        if found := re.search(rf"<hint>\w (\w+)\. A {facts.contrast} {facts.kind} means \1\.</hint>", learned):
            true.append(found[1] == facts.diagnosis)
    assert len(true) > 40 and np.mean(true) == pytest.approx(often, abs=0.15)


def test_three_of_four_lessons_follow_what_is_told_against_the_picture(processor) -> None:
    facts = next(f for f in every("Fundus") if taught(f, TOPICS["diagnosis"], LENGTH))
    believed = []
    for prompt, learned in read(processor, tasks_on(processor, [facts]).draw("aware", 800)):
        told = re.search(rf"<hint>\w \w+\. A {facts.contrast} {facts.kind} means (\w+)\.</hint>", prompt)
        if told and told[1] != facts.diagnosis:
            said = re.findall(r"means (\w+)", learned)[-1]
            assert said in (told[1], facts.diagnosis)
            options = dict(re.findall(r"(\w)\) (\w+)\n", prompt))
            assert options[re.findall(r"\((\w)\)", learned)[-1]] == said
            believed.append(said == told[1])
    assert len(believed) > 40 and np.mean(believed) == pytest.approx(0.75, abs=0.12)


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
