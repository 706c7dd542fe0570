"""The table of methods: every row of Table 1 once, every row a run of its own."""

from pathlib import Path

import pytest
import torch

from kepo_core.analysis.statistics import accuracy_table
from kepo_core.data import phantom
from kepo_core.data.records import MODALITIES, Answer, AnswerOutcome
from kepo_core.errors import ParamError
from kepo_core.experiment import experiment
from kepo_core.experiment.experiment import StudyData
from kepo_core.experiment.methods import beside_paper, choose, method, methods, methods_table, name_of, paper_table
from kepo_core.params import Params
from kepo_core.runs.run import Run

ROOT = Path(__file__).parents[2]


def test_every_row_of_table_1_has_its_method_and_no_two_methods_are_the_same_run() -> None:
    rows = [entry.row for entry in methods().values() if entry.row]
    assert sorted(rows) == sorted(paper_table().index) and len(rows) == 19
    base = Params()
    made = {name: base.replace(**entry.overrides(base)) for name, entry in methods().items()}
    assert len({params.hash for params in made.values()}) == len(made)
    assert made["kepo-tau1"].hash == base.hash
    assert made["teacher"].student == base.teacher
    other = base.replace(explore=False, tau=0.0, thinking=False)  # a row is what its name says, over any file
    assert other.replace(**method("kepo-tau1").overrides(other)).hash == base.hash
    for entry in methods().values():
        if entry.row:
            assert made[entry.name].thinking == (entry.row[2] == "thinking"), entry.name


@pytest.mark.parametrize("file", ["params/phantom.yaml", "params/paper.yaml", "params/smoke.yaml"])
def test_every_row_is_called_by_its_name_over_any_file(file: str) -> None:
    base = Params.load(ROOT / file)
    for name, row in methods().items():
        assert name_of(base.replace(**row.overrides(base)).replace(seed=7, learning_rate=1e-4)) == name


def test_what_is_no_row_or_two_at_once_is_called_by_its_method() -> None:
    assert name_of(Params(tau=0.5)) == "kepo-tau0.5"
    assert name_of(Params(method="sft", thinking=False, tau=0.5)) == "sft-nothink"
    assert name_of(Params(distill=False, hint_context="none", hint_source="other")) == "explore-only"
    other = Params(distill=False, explore=False, student="other/student")
    assert name_of(other.replace(scale_rewards="group")) == "grpo-std"


def test_the_papers_averages_are_those_of_its_columns() -> None:
    table = paper_table()
    assert table.shape == (19, 11)
    assert (table[list(MODALITIES)].mean(axis=1) - table["Avg."]).abs().max() < 0.02
    assert (table[list(MODALITIES[1:])].mean(axis=1) - table["Avg. (OOD)"]).abs().max() < 0.02


def test_rows_are_chosen_by_name_or_as_a_whole() -> None:
    base = Params()
    chosen, left_out = choose("table1", base)
    assert len(chosen) == 16 and sorted(left_out) == ["huatuo-7b-nothink", "qwen-8b", "qwen-8b-nothink"]
    assert len(choose("all", base)[0]) == len(methods()) - 3
    real = base.replace(student="Qwen/Qwen3-VL-2B-Instruct", teacher="Qwen/Qwen3-VL-32B-Instruct")
    chosen, left_out = choose("table1", real)
    assert len(chosen) == 19 and not left_out and chosen["teacher"].student == real.teacher
    chosen, left_out = choose(" grpo , qwen-8b", base)
    assert list(chosen) == ["grpo", "qwen-8b"] and not left_out  # whoever names it means it
    assert list(methods_table(chosen).index) == ["grpo", "qwen-8b"]
    with pytest.raises(ParamError, match="no method is called 'grop'"):
        choose("grpo,grop", base)
    with pytest.raises(ParamError, match="rows is ' , ', expected table1, all, or names"):
        choose(" , ", base)


def test_ours_stand_beside_the_papers() -> None:
    given = [Answer(f"{m}{i}", m, "", "", AnswerOutcome.CORRECT, "A", i < 3, True, 5, True)
             for m in MODALITIES for i in range(4)]  # fmt: skip
    beside = beside_paper(accuracy_table({"grpo": given, "rloo": given}, None, "MRI"))
    assert beside.loc["grpo", ("ours", "MRI")] == 75 and beside.loc["grpo", ("paper", "MRI")] == 79
    assert beside.loc["grpo", ("paper", "Avg. (OOD)")] == 73.67
    assert beside.loc["rloo", "paper"].isna().all() and beside["ours"].notna().all(axis=None)


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ParamError, match=r"no method is called 'grop', expected one of zero-shot-nothink, "):
        method("grop")


@pytest.fixture(scope="module")
def smoke(tmp_path_factory: pytest.TempPathFactory) -> tuple[Params, StudyData]:
    """Four questions to train on, two of each modality to answer."""
    root = tmp_path_factory.mktemp("study")
    phantom.write_phantom(root / "data", 0, dict.fromkeys(MODALITIES, 8))
    sizes = {"train_items": 4, "eval_items": 2, "group_size": 2, "prompts_per_step": 2, "prompts_per_device": 2,
             "max_steps": 1, "save_steps": 0, "rejection_budget": 2}  # fmt: skip
    base = Params.load(None, {"data_root": str(root / "data"), "results_dir": str(root / "results"), **sizes})
    return base, experiment.load_data(base)


@pytest.mark.parametrize("name", [n for n, m in methods().items() if "/" not in m.parameters.get("student", "")])
def test_every_row_that_the_package_has_models_for_trains_and_answers(
    smoke: tuple[Params, StudyData], name: str
) -> None:
    base, data = smoke
    params = base.replace(**method(name).overrides(base))
    run = Run.allocate(params)
    models = experiment.load_models(params)
    trainer = experiment.make_trainer(params, run, data, models)
    before = {key: value.clone() for key, value in models.student.state_dict().items()}
    metrics = experiment.train(trainer, run)
    answers = experiment.evaluate_student(params, models, data.test)
    assert [a.question_id for a in answers] == [q.id for q in data.test] and len(answers) == 16
    assert all(("<think>" in a.completion) == params.thinking for a in answers if a.format_ok)
    if params.method == "none":
        assert trainer is None and metrics.empty
    else:
        changed = any(not torch.equal(value, before[key]) for key, value in models.student.state_dict().items())
        # Advantages of groups whose rewards are all equal are 0: where nothing else teaches, nothing may be learned.
        assert len(metrics) == 1 and (changed or not (params.distill or params.method != "kepo"))
