"""The task protocol, templates, and the public face."""

import doctest
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from text_harness import ASKING, TELLING, WORDS, make_trainer, riddles, text_model, tokenizer

import kepo_core
from kepo_core.method.checks import check_task
from kepo_core.method.task import Task, Templates, images_of, with_images
from kepo_core.method.teacher import Teacher

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Riddle 0?"}]


def parts(*texts: str | None) -> list[dict[str, Any]]:
    """A user message: None is a picture's place."""
    content = [{"type": "image"} if text is None else {"type": "text", "text": text} for text in texts]
    return [{"role": "user", "content": content}]


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Riddle 0?", "Riddle 0?\n\nSay egg."),
        ("", "Say egg."),
        (CHAT, [CHAT[0], {"role": "user", "content": "Riddle 0?\n\nSay egg."}]),
        (
            [*CHAT, {"role": "assistant", "content": "Well:"}],
            [CHAT[0], {"role": "user", "content": "Riddle 0?\n\nSay egg."}, {"role": "assistant", "content": "Well:"}],
        ),
        (parts(None, "Look"), parts(None, "Look\n\nSay egg.")),
        (parts("One", None, "two", None), parts("One", None, "two\n\nSay egg.", None)),
        (parts(None), parts(None, "Say egg.")),
    ],
)
def test_a_template_is_added_to_the_last_user_turn(prompt: Any, expected: Any) -> None:
    task = Templates(asking="Say {word}.", telling="{hint}")
    assert task.ask({"prompt": prompt, "word": "egg"}) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Riddle 0?", "Hint: look. Riddle 0?"),
        (CHAT, [CHAT[0], {"role": "user", "content": "Hint: look. Riddle 0?"}]),
        (parts("One", None, "two"), parts(None, "Hint: look. One\n\ntwo")),
    ],
)
def test_a_template_that_names_the_prompt_takes_its_place(prompt: Any, expected: Any) -> None:
    assert Templates("x", "Hint: {hint}. {prompt}").tell({"prompt": prompt}, "look") == expected


def test_hints_and_columns_with_braces_stay_what_they_are() -> None:
    task = Templates(asking="{solution!s:>3} {{plain}}", telling="{hint}")
    assert task.ask({"prompt": "p", "solution": "{hint}"}) == "p\n\n{hint} {plain}"
    assert task.tell({"prompt": "p", "solution": "x", "hint": "a column"}, "{solution} {0}") == "p\n\n{solution} {0}"


def test_the_row_is_left_alone() -> None:
    row = {"prompt": parts(None, "Look"), "word": "egg"}
    Templates("{word}", "{hint}").tell(row, "x")
    assert row == {"prompt": parts(None, "Look"), "word": "egg"}


@pytest.mark.parametrize(
    ("asking", "telling", "sentence"),
    [
        ("x", "the answer is {solution}", r"telling is .* expected \{hint\} in it"),
        ("{hint}", "{hint}", r"asking names \{hint\}"),
        ("{solution", "{hint}", "asking is .* which is not a format string"),
        ("x", "{hint} {}", r"telling names \{\}, expected a column's name"),
        ("{solution.__class__}", "{hint}", r"asking names \{solution.__class__\}"),
        ("{solution[0]}", "{hint}", r"asking names \{solution\[0\]\}"),
        ("{solution:{width}}", "{hint}", r"asking names \{solution\}"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused(asking: str, telling: str, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Templates(asking=asking, telling=telling)


def test_a_column_that_the_rows_lack_is_named_with_what_they_have(tmp_path: Path) -> None:
    task = Templates(asking=ASKING, telling=TELLING)
    assert task.columns == ("solution",)
    bare = riddles().remove_columns("solution").add_column("answer", ["x"] * 8)
    with pytest.raises(ValueError, match="train_dataset lacks solution, which the task needs: it has prompt, answer"):
        trainer = make_trainer(tmp_path)
        type(trainer)(
            trainer.model, trainer.reward_funcs, trainer.args, bare, processing_class=trainer.processing_class,
            teacher=trainer.teacher, task=task,
        )  # fmt: skip


class Riddles(Task):
    """The smallest possible task."""

    def ask(self, row: Any) -> Any:
        return None

    def tell(self, row: Any, hint: str) -> Any:
        return row["prompt"] + " Think!"


def test_a_task_of_two_methods_records_nothing_and_may_ask_no_teacher() -> None:
    task = Riddles()
    assert task.columns == () and task.read({}, "x", True) == {} and task.metrics([]) == {}
    assert not check_task(task, {"prompt": "p"})

    class Texts(Riddles):
        def tell(self, row: Any, hint: str) -> Any:
            return "Think!"

    with pytest.raises(ValueError, match="the task's tell returns str but the prompt column holds list, expected both"):
        check_task(Texts(), {"prompt": CHAT})


def test_what_a_task_reads_must_not_be_called_as_another_column(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, explore=False)
    trainer.task.read = lambda row, text, finished: {"reward": 1.0}
    with pytest.raises(ValueError, match="returns a column named reward, which the rollouts file already uses"):
        trainer.train()


def test_pictures_come_from_either_column() -> None:
    picture = Image.new("RGB", (2, 2))
    assert images_of({}) == images_of({"image": None}) == images_of({"images": None}) == images_of({"images": []}) == []
    assert images_of({"image": picture}) == images_of({"images": [picture]}) == [picture]
    assert with_images("text", {"prompt": "text"}) == "text"
    filled = with_images(CHAT, {"images": [picture, picture]})
    assert [part["type"] for part in filled[1]["content"]] == ["image", "image", "text"]


def test_a_teacher_of_text_takes_a_tokenizer_and_a_teacher_without_eyes_fits_no_student_with_some() -> None:
    from kepo_harness import sharp_model

    from kepo_core.testbed.embedded import build_processor

    teacher = Teacher(text_model(1), tokenizer())
    with pytest.raises(ValueError, match="the student sees pictures but the teacher does not"):
        teacher.check_fits(sharp_model(0), build_processor())


@pytest.mark.parametrize("row", [{"prompt": "Riddle 7?"}, {"prompt": "Riddle 7?", "solution": None}])
def test_a_column_that_a_row_lacks_never_enters_a_prompt(row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"a row has no solution, which the template .* uses.*Riddle 7\?"):
        Templates(ASKING, TELLING).ask(row)


def test_a_format_that_does_not_fit_its_column_is_named() -> None:
    with pytest.raises(ValueError, match=r"the template .* cannot be filled: .*'f'"):
        Templates("It is {solution:.2f}.", TELLING).ask({"prompt": "p", "solution": "egg"})


def test_a_task_that_asks_of_a_later_row_alone_is_told_of(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    ask = trainer.task.ask
    trainer.task.ask = lambda row: None if row["solution"] == WORDS[0] else ask(row)
    with pytest.raises(ValueError, match=r"task\.ask returned None for the first row but not for this one"):
        trainer.train()


# The public face --------------------------------------------------------------------------------------------------


def test_the_public_face_is_there_and_lazy() -> None:
    assert set(kepo_core.__all__) >= {
        "KEPOConfig", "KEPOTrainer", "Teacher", "ServedTeacher", "Templates", "MultipleChoice", "objective", "explore",
    }  # fmt: skip
    for name in kepo_core.__all__:
        assert getattr(kepo_core, name) is not None and name in dir(kepo_core)
    with pytest.raises(AttributeError, match="has no attribute 'Trainer', expected one of KEPOConfig"):
        getattr(kepo_core, "Trainer")  # noqa: B009
    start = time.perf_counter()
    code = "import sys, kepo_core; assert not {'torch', 'transformers', 'trl', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert time.perf_counter() - start < 3  # an interpreter's own start, on a busy machine


def test_the_readmes_library_example_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As written, except for the names of models and data, and with one step instead of all."""
    import datasets

    monkeypatch.chdir(tmp_path)
    readme = (Path(kepo_core.__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    code = readme.split("## Use it as a library")[1].split("```python\n")[1].split("```")[0]
    for seed, name in enumerate(("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B")):
        text_model(seed).save_pretrained(tmp_path / str(seed))
        tokenizer().save_pretrained(tmp_path / str(seed))
        assert name in code
        code = code.replace(name, str(tmp_path / str(seed)))
    quick = {"max_steps": 1, "use_cpu": True, "per_device_train_batch_size": 8, "max_completion_length": 8}
    settings = ", ".join(f"{name}={value}" for name, value in quick.items())
    assert code.count('output_dir="out",') == 1
    code = code.replace('output_dir="out",', f'output_dir="out", {settings},')
    rows = [{"question": f"{i} + 1?", "answer": f"It is\n#### {i + 1}"} for i in range(4)]
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, split: datasets.Dataset.from_list(rows))
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert scope["trainer"].state.global_step == 1


@pytest.mark.parametrize("name", kepo_core.__all__)
def test_the_examples_in_docstrings_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    thing = getattr(kepo_core, name)
    (found,) = doctest.DocTestFinder(recurse=False).find(thing, name, globs={})
    assert found.examples, f"{name} has no example"
    assert doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(found).failed == 0
