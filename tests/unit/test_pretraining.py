"""What the embedded models are taught, and that teaching is reproducible."""

import hashlib
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kepo_core.data import phantom
from kepo_core.data.phantom import Asked, Facts
from kepo_core.data.records import MODALITIES
from kepo_core.task.rewards import score
from kepo_core.testbed.lessons import (
    LETTER_WEIGHT,
    NO_HABITS,
    STUDENT_HABITS,
    Habits,
    Pool,
    Tasks,
    believed,
    careful,
    fact_labels,
    guess,
    sloppy,
)
from kepo_core.testbed.pretraining import Recipe, pretrain

TOPICS = {topic.name: topic for topic in phantom.TOPICS}


def drawn(count: int, seed: int = 0) -> list[Asked]:
    rng = np.random.default_rng(seed)
    return [phantom.ask(rng, phantom.draw_facts(rng, "OCT"), phantom.draw_topics(rng, 1)[0]) for _ in range(count)]


def judged(text: str, asked: Asked):
    return score(text, asked.answer, asked.options, thinking=True, finished=True)


def test_careful_is_right_sloppy_breaks_the_format_only_and_guesses_are_fair() -> None:
    rng = np.random.default_rng(0)
    asked = drawn(300)
    assert all(judged(careful(a), a).accuracy == judged(careful(a), a).format_ok == 1 for a in asked)
    broken = [judged(sloppy(a, rng), a) for a in asked]
    assert not any(s.format_ok for s in broken) and 0.2 < np.mean([s.accuracy for s in broken]) < 0.5
    guessed = [judged(guess(a, rng), a) for a in asked]
    chance = np.mean([1 / len(a.options) for a in asked])
    assert all(s.format_ok for s in guessed) and abs(np.mean([s.accuracy for s in guessed]) - chance) < 0.09


def test_a_belief_is_about_a_fact_that_the_question_needs() -> None:
    rng = np.random.default_rng(0)
    facts = Facts("CT", "ring", "upper left", "small", "two", "dark")
    seen = {name: phantom.ask(rng, facts, topic) for name, topic in TOPICS.items()}
    mistakes = {name: believed(asked, rng) for name, asked in seen.items()}
    assert {name for name, mistake in mistakes.items() if mistake} == {"kind", "diagnosis", "number", "grade"}
    assert mistakes["diagnosis"].facts == Facts("CT", "disc", "upper left", "small", "two", "dark")
    assert mistakes["grade"].facts == Facts("CT", "ring", "upper left", "small", "one", "dark")
    assert (
        believed(phantom.ask(rng, Facts("CT", "bar", "upper left", "small", "one", "dark"), TOPICS["kind"]), rng)
        is None
    )


def test_a_belief_names_its_option_where_there_is_one_and_any_other_where_not() -> None:
    rng = np.random.default_rng(0)
    facts = Facts("CT", "ring", "upper left", "small", "two", "dark")
    absent = Counter()
    for _ in range(300):
        asked = phantom.ask(rng, facts, TOPICS["kind"])
        mistake = believed(asked, rng)
        if "disc" in asked.options:
            assert mistake.value == "disc" and mistake.thought.startswith("The finding is a disc (")
        else:
            absent[mistake.answer == asked.answer] += 1
    assert min(absent[True], absent[False]) > 10


def test_mirrored_pictures_keep_their_facts(processor) -> None:
    rng = np.random.default_rng(0)
    facts = [Facts("Fundus", "disc", place, "large", "one", "bright") for place in phantom.PLACES]
    plain = [Facts("Fundus", "disc", place, "large", "one", "dark") for place in phantom.PLACES]
    assert facts != plain
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


@pytest.fixture(scope="module")
def pool() -> Pool:
    from kepo_core.testbed.embedded import build_processor

    return Pool.draw(build_processor(), 40, 3)


def completions(processor, pool: Pool, habits: Habits, task: str, count: int = 200) -> list[str]:
    batch = Tasks(processor, pool, habits, np.random.default_rng(0)).draw(task, count)
    return [
        processor.tokenizer.decode(ids[weight > 0])
        for ids, weight in zip(batch.input_ids, batch.labels_weight, strict=True)
    ]


def test_only_completions_are_learned_and_letters_weigh_more(processor, pool: Pool) -> None:
    batch = Tasks(processor, pool, NO_HABITS, np.random.default_rng(0)).draw("think", 8)
    for ids, mask, weight in zip(batch.input_ids, batch.attention_mask, batch.labels_weight, strict=True):
        start = int((weight > 0).nonzero()[0])
        assert processor.tokenizer.decode(ids[:start]).endswith("assistant\n")
        assert ((weight > 0)[start:] == mask[start:].bool()).all() and not weight[mask == 0].any()
        assert sorted(set(weight.tolist())) == [0, 1, LETTER_WEIGHT] and (weight == LETTER_WEIGHT).sum() == 1
    assert batch.pixels is not None and batch.pixels.shape == (8, 64, 192)


def test_version_3_draws_the_lessons_that_its_models_were_built_from(processor, pool: Pool) -> None:
    """Another draw, and notebook 00 no longer rebuilds the shipped pair."""
    digest = hashlib.sha256()
    for habits in (NO_HABITS, STUDENT_HABITS):
        tasks = Tasks(processor, pool, habits, np.random.default_rng(0))
        for task in ("lookup", "caption", "think", "plain", "hint", "aware"):
            batch = tasks.draw(task, 20)
            digest.update(batch.input_ids.numpy().tobytes() + batch.labels_weight.numpy().tobytes())
    assert digest.hexdigest()[:16] == "a10ed0f4936f8a8a"


def test_lookups_are_right_and_need_no_picture(processor, pool: Pool) -> None:
    batch = Tasks(processor, pool, NO_HABITS, np.random.default_rng(0)).draw("lookup", 50)
    assert batch.pixels is None
    for ids, weight in zip(batch.input_ids, batch.labels_weight, strict=True):
        listed = processor.tokenizer.decode(ids[weight == 0]).split("user\n")[1].split("<|im_end|>")[0]
        options = {word: letter for letter, word in (line.split(") ") for line in listed.splitlines())}
        named = processor.tokenizer.decode(ids[weight > 0]).removesuffix("<|im_end|>").strip(" .").split(").")
        found = [part.strip(" )").split(" (") for part in named]
        assert len(found) == len(options) and all(options[word] == letter for word, letter in found)


def test_habits_have_their_share(processor, pool: Pool) -> None:
    never = completions(processor, pool, NO_HABITS, "think")
    assert not any("Perhaps" in text for text in never) and all(text.startswith("<think>") for text in never)
    always = Habits(hasty=dict.fromkeys(TOPICS, 1.0), mistaken=0.0, sloppy=0.0, unheeding=1.0)
    told = completions(processor, pool, always, "aware")
    assert all(text.startswith("<think>Perhaps") for text in told)
    usual = completions(processor, pool, STUDENT_HABITS, "think", 400)
    said = [text for text in usual if "finding is a" in text or "means" in text]
    assert (
        not any(word in text for text in said for word in (" ring", " cross"))
        or np.mean([" ring" in text or " cross" in text for text in said]) < 0.05
    )
    assert 0.08 < np.mean([not (t.startswith("<think>") and "</think>\n<answer>" in t) for t in usual]) < 0.18


def test_hints_state_the_evidence_and_half_of_them_contradict_the_picture(processor, pool: Pool) -> None:
    hints = completions(processor, pool, NO_HABITS, "hint", 20)
    assert all(text.startswith("<hint>") and text.endswith("</hint><|im_end|>") for text in hints)
    tasks = Tasks(processor, Pool(pool.pixels[:1], pool.facts[:1]), NO_HABITS, np.random.default_rng(0))
    batch = tasks.draw("aware", 300)
    shown, agree = pool.facts[0], Counter()
    for ids, weight in zip(batch.input_ids, batch.labels_weight, strict=True):
        text = processor.tokenizer.decode(ids[weight == 0])
        if "<hint>The finding is a" in text:  # a diagnosis or a kind
            hint = text.split("<hint>")[-1].split("</hint>")[0]
            agree[f" {shown.kind}." in hint] += 1
            assert hint.removesuffix(".") in processor.tokenizer.decode(ids[weight > 0])
    assert min(agree[True], agree[False]) / agree.total() > 0.2


def test_pretraining_is_reproducible_and_the_student_starts_as_its_teacher() -> None:
    recipe = Recipe(
        pictures=64,
        vision_steps=1,
        teacher_phases=((1, {"lookup": 4, "think": 4}),),
        student_phases=((2, {"think": 4, "aware": 4}),),
    )
    threads, built = torch.get_num_threads(), []
    for number in (1, 3):  # on however many cores
        torch.set_num_threads(number)
        built.append(pretrain(recipe, 1, log=lambda text: None)[0])
        assert torch.get_num_threads() == number
    torch.set_num_threads(threads)
    one, two = built
    for name, model in one.items():
        for (key, left), right in zip(model.state_dict().items(), two[name].state_dict().values(), strict=True):
            assert torch.equal(left, right), key
    student, teacher = (one[name].state_dict() for name in ("student", "teacher"))
    changed = {key for key, value in student.items() if not torch.equal(value, teacher[key])}
    assert "lm_head.weight" in changed
    assert not any("visual" in key for key in changed)  # the tower, once taught, is left alone
    other, _ = pretrain(recipe, 2, log=lambda text: None)
    assert not torch.equal(other["teacher"].lm_head.weight, one["teacher"].lm_head.weight)
