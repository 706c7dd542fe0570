"""The task file of notebook 06."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
from text_harness import make_trainer
from transformers import TrainerState

from kepo_core.errors import ParamError
from kepo_core.experiment import own_task
from kepo_core.params import project_root

LINES = {
    "REWARDS": "REWARDS = [lambda completions, **_: [0.0] * len(completions)]",
    "TASK": "from kepo_core import Templates\nTASK = Templates('x', '{hint}')",
    "load_data": "def load_data():\n    return [{'prompt': 'x'}], [{'prompt': 'y'}]",
    "load_models": "def load_models():\n    return None, None, None",
}


@pytest.mark.parametrize("name", ["kepo_text", "kepo_vqa"])
def test_the_examples_are_task_files(name: str) -> None:
    own = own_task.read_task(f"examples/{name}.py")
    train, held_out = own.load_data()
    assert len(own.rewards) >= 1 and set(own.task.columns) <= train[0].keys() and train[0].keys() == held_out[0].keys()


@pytest.mark.parametrize("missing", LINES)
def test_a_name_that_the_file_lacks_is_told_with_what_it_should_be(tmp_path: Path, missing: str) -> None:
    file = tmp_path / "mine.py"
    file.write_text("\n".join(line for name, line in LINES.items() if name != missing))
    with pytest.raises(ParamError, match=re.escape(f"mine.py does not define {missing}, expected a")):
        own_task.read_task(str(file))
    file.write_text("\n".join(LINES.values()))
    assert own_task.read_task(str(file)).load_data()[1] == [{"prompt": "y"}]


def test_a_file_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParamError, match=r"task_file is 'nowhere\.py', which does not exist"):
        own_task.read_task("nowhere.py")
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ParamError, match=r"expected a Python file \(.py\)"):
        own_task.read_task(str(tmp_path / "mine.txt"))


def test_an_environment_of_another_launcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ParamError, match="WORLD_SIZE is 2 in the environment"):
        own_task.read_task("examples/kepo_text.py")


def test_what_its_own_code_raises_is_not_swallowed(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        own_task.read_task(str(tmp_path / "mine.py"))


def test_every_training_has_a_folder_of_its_own(tmp_path: Path) -> None:
    folders = {own_task.new_folder(str(tmp_path)) for _ in range(3)}
    assert len(folders) == 3 and all(folder.name.startswith("own-task-2") for folder in folders)


def test_rewards_before_and_after_with_their_intervals() -> None:
    before = {"eval_reward": 0.5, "eval_reward_std": 1.0, "eval_rewards/a/mean": 0.25, "eval_rewards/a/std": 0.5}
    table = own_task.reward_table(before, before | {"eval_rewards/a/mean": 0.75}, 100)
    assert list(table.index) == ["sum", "a"] and list(table.columns) == ["before", "± before", "after", "± after"]
    assert table.loc["a"].tolist() == pytest.approx([0.25, 0.098, 0.75, 0.098])


def test_the_first_hint_shows_what_is_asked(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    asked, hints = own_task.first_hint(trainer, 8, 0)
    assert asked.startswith("Riddle 0?") and hints == ["h0"]
    trainer.task.ask = lambda row: None
    assert own_task.first_hint(trainer, 8, 0)[1] == [None]
    assert own_task.text_of([{"content": [{"type": "image"}, {"type": "text", "text": "x"}]}]) == "[picture]\nx"
    assert (project_root() / "examples").is_dir()


def test_the_training_cell_executed_twice_is_refused() -> None:
    own_task.check_untrained(SimpleNamespace(state=TrainerState()))
    with pytest.raises(ParamError, match="trained in this kernel already"):
        own_task.check_untrained(SimpleNamespace(state=TrainerState(global_step=1)))
