"""PhantomVQA: facts are true in the picture, questions are answerable, files are in the raw layout."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kepo_core.data import phantom, phantom_render
from kepo_core.data.loading import load_questions
from kepo_core.data.phantom import CONTRASTS, KINDS, PLACES, TOPICS, Facts
from kepo_core.data.records import MODALITIES, QUESTION_TYPES
from kepo_core.data.splits import image_key


def changed_by_finding(facts: Facts, seed: int) -> np.ndarray:
    """Where the picture differs from one of the same stream with the opposite contrast: the finding."""
    other = Facts(
        **{**{f: getattr(facts, f) for f in facts.__slots__}, "contrast": CONTRASTS[facts.contrast == "bright"]}
    )
    one, two = (phantom.picture(np.random.default_rng(seed), f).astype(int) for f in (facts, other))
    return (one - two).sum(-1)


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("place", PLACES)
def test_finding_is_in_its_quadrant_with_its_contrast(modality: str, place: str) -> None:
    for seed in range(6):
        facts = Facts(
            modality, KINDS[seed % 4], place, ("small", "large")[seed % 2], ("one", "two")[seed // 3], "bright"
        )
        difference = changed_by_finding(facts, seed)
        rows, columns = np.nonzero(np.abs(difference) > 20)
        assert len(rows) > 15
        # Centres lie well inside; a large finding may reach one pixel over the border.
        assert (rows > 30.5).all() if "lower" in place else (rows < 32.5).all()
        assert (columns > 30.5).all() if "right" in place else (columns < 32.5).all()
        assert difference.sum() > 0  # bright is brighter than dark


@pytest.mark.parametrize("kind", KINDS)
def test_large_and_two_cover_more(kind: str) -> None:
    def area(size: str, number: str) -> float:
        facts = Facts("MRI", kind, "upper left", size, number, "bright")
        return float(np.mean([(np.abs(changed_by_finding(facts, s)) > 60).sum() for s in range(8)]))

    assert area("large", "one") > 1.5 * area("small", "one")
    assert area("small", "two") > 1.7 * area("small", "one")


def test_two_fact_answers_need_both_facts() -> None:
    by_kind, by_contrast = {}, {}
    for kind in KINDS:
        for contrast in CONTRASTS:
            name = Facts("CT", kind, "upper left", "small", "one", contrast).diagnosis
            by_kind.setdefault(kind, set()).add(name)
            by_contrast.setdefault(contrast, set()).add(name)
    assert all(len(names) == 2 for names in by_kind.values())
    assert all(len(names) == 4 for names in by_contrast.values())
    assert {
        Facts("CT", "bar", "upper left", s, n, "dark").grade for s in phantom.SIZES for n in phantom.NUMBERS
    } == set(phantom.GRADES)


def test_in_version_4_a_meaning_says_nothing_on_another_modality() -> None:
    for kind in KINDS:
        for contrast in CONTRASTS:
            names = Counter(phantom.meanings("4", m).diagnosis[kind, contrast] for m in MODALITIES)
            assert names == dict.fromkeys(phantom.DIAGNOSES, 2)
    for size in phantom.SIZES:
        for number in phantom.NUMBERS:
            grades = Counter(phantom.meanings("4", m).grade[size, number] for m in MODALITIES)
            assert grades == dict.fromkeys(phantom.GRADES, 2)


@pytest.mark.parametrize("modality", MODALITIES)
@pytest.mark.parametrize("version", phantom.VERSIONS)
def test_within_a_modality_every_answer_is_equally_likely(modality: str, version: str) -> None:
    """So neither question nor options give an answer away, and for a diagnosis neither of its two facts alone."""
    every = [
        Facts(modality, kind, place, size, number, contrast, version)
        for kind in KINDS for place in PLACES for size in phantom.SIZES
        for number in phantom.NUMBERS for contrast in CONTRASTS
    ]  # fmt: skip
    for topic in TOPICS[1:]:
        counts = Counter(getattr(facts, topic.attribute) for facts in every)
        assert counts == dict.fromkeys(topic.values, len(every) // len(topic.values))
    for kind in KINDS:
        assert len({facts.diagnosis for facts in every if facts.kind == kind}) == 2
    for contrast in CONTRASTS:
        assert {facts.diagnosis for facts in every if facts.contrast == contrast} == set(phantom.DIAGNOSES)


def test_what_is_written_of_version_4_is_read_back_with_its_meanings(tmp_path: Path) -> None:
    phantom.write_phantom(tmp_path, 5, {"CT": 20}, "4")
    facts = phantom.load_facts(tmp_path)
    assert len(facts) == 20 and {shown.version for shown in facts.values()} == {"4"}
    asked = [q for q in load_questions(tmp_path) if q.question_type in ("Disease Diagnosis", "Lesion Grading")]
    for question in asked:
        shown = facts[image_key(question)]
        value = getattr(shown, phantom.topic_of(question.question).attribute)
        assert question.options[question.letters.index(question.answer)] == value
    assert any(shown.diagnosis != replace(shown, version="3").diagnosis for shown in facts.values())


def test_version_3_is_written_as_it_always_was(small_set: Path) -> None:
    rows = json.loads((small_set / "facts.json").read_text()).values()
    assert all(list(row) == [*phantom.WORDS, "diagnosis", "grade"] for row in rows)


@pytest.mark.parametrize("modality", MODALITIES)
def test_sight_is_by_modality(modality: str) -> None:
    """Two pictures of one stream differ by their finding alone; noise is what is left after a blur of its own."""
    sight = phantom_render.SIGHTS["4"][modality]
    facts = Facts(modality, "disc", "upper left", "large", "one", "bright")
    plain, noisy = (
        np.stack([phantom.picture(np.random.default_rng(seed), replace(facts, version=v)) for seed in range(4)]).mean(
            -1
        )
        for v in ("3", "4")
    )
    apart = (plain - noisy)[:, 40:, 40:]  # away from the finding, and not clipped
    grain = (apart[:, 1:] - apart[:, :-1]).std() / 2**0.5 / 255
    assert grain == pytest.approx(sight.noise, rel=0.3)


def test_questions_are_answerable_and_letters_balanced() -> None:
    rng = np.random.default_rng(0)
    letters, counts = Counter(), Counter()
    for _ in range(4000):
        facts = phantom.draw_facts(rng, "OCT")
        asked = phantom.ask(rng, facts, phantom.draw_topics(rng, 1)[0])
        assert asked.options.count(asked.value) == 1 and 2 <= len(set(asked.options)) == len(asked.options) <= 4
        assert asked.value == getattr(facts, asked.topic.attribute)
        assert (
            asked.evidence.removesuffix(".") in asked.thought
            and asked.thought.endswith(f" ({asked.answer}).")
            and "{" not in asked.thought
        )
        if asked.topic.conclusion:
            assert asked.value in asked.thought and asked.value not in asked.evidence.split()
        assert phantom.topic_of(asked.question) is asked.topic
        assert (asked.topic.level == 3) == bool(asked.topic.conclusion)
        counts[len(asked.options)] += 1
        letters[asked.answer] += len(asked.options) == 4
    assert set(counts) == {2, 3, 4}
    shares = [letters[letter] / letters.total() for letter in "ABCD"]
    assert max(shares) - min(shares) < 0.05
    assert {t.question_type for t in TOPICS} == set(QUESTION_TYPES)


@pytest.fixture(scope="module")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("phantom")
    phantom.write_phantom(root, seed=5, images=dict.fromkeys(MODALITIES, 6))
    return root


def test_written_set_is_read_by_the_loader_for_real_data(small_set: Path) -> None:
    questions = load_questions(small_set)
    assert Counter(q.modality for q in questions) == dict.fromkeys(MODALITIES, 6 * phantom.QUESTIONS_PER_IMAGE)
    facts = json.loads((small_set / "facts.json").read_text())
    for q in questions:
        truth = facts[q.image.relative_to(small_set).as_posix()]
        assert q.options[q.letters.index(q.answer)] in truth.values()
        assert Image.open(q.image).size == (64, 64)


def test_same_seed_same_files_and_other_seed_other_files(small_set: Path, tmp_path: Path) -> None:
    for seed in (5, 6):
        phantom.write_phantom(tmp_path / str(seed), seed, images=dict.fromkeys(MODALITIES, 6))
    files = [p.relative_to(small_set) for p in sorted(small_set.rglob("*")) if p.is_file()]
    assert len(files) == 8 * 6 + 8 + 1
    assert all((small_set / f).read_bytes() == (tmp_path / "5" / f).read_bytes() for f in files)
    assert not any((small_set / f).read_bytes() == (tmp_path / "6" / f).read_bytes() for f in files)


def test_set_is_written_once_and_atomically(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def write(root: Path, seed: int, version: str) -> None:
        calls.append((seed, version))
        (root / "half").write_text("x")
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(phantom, "write_phantom", write)
    with pytest.raises(KeyboardInterrupt):
        phantom.ensure_phantom(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []  # nothing half-written stays
    root = phantom.ensure_phantom(tmp_path, 3)
    assert root == phantom.ensure_phantom(tmp_path, 3) and calls == [(3, "3"), (3, "3")]
    assert [p.name for p in tmp_path.iterdir()] == [root.name]
