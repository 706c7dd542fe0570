import dataclasses
import json
import math
import os
import pickle
import types
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from kepo_core import params_trl
from kepo_core.errors import ParamError
from kepo_core.method.options import declared, kind_of
from kepo_core.params import Params, check_names, project_root, resolve
from kepo_core.params_io import parameter_cells, tagged_cell
from kepo_core.task.prompts import HINT_CONTEXTS

ROOT = Path(__file__).parents[2]
FIELDS = declared(Params)
TRL = {"temperature": 0.5, "loss_type": "dapo", "use_vllm": True, "num_iterations": 2, "lr_scheduler_type": "cosine"}


def bad(match: str, **overrides):
    """Overrides must be refused with one sentence that matches."""
    with pytest.raises(ParamError, match=match) as caught:
        Params.load(None, overrides)
    assert "\n" not in str(caught.value)


@pytest.fixture
def write(tmp_path):
    def write(text: str) -> Path:
        path = tmp_path / "some.yaml"
        path.write_text(text)
        return path

    return write


# -- the files


def test_phantom_yaml_names_every_parameter_with_its_default():
    file = ROOT / "params/phantom.yaml"
    assert yaml.safe_load(file.read_text()).keys() == Params().to_dict().keys() - {"run_dir"}
    assert Params.load(file) == Params()


@pytest.mark.parametrize("name", ["smoke.yaml", *(path.name for path in (ROOT / "params").glob("[!s]*.yaml"))])
def test_every_shipped_file_loads(name):
    assert isinstance(Params.load(ROOT / "params" / name), Params)


def test_the_paper_and_the_released_code_are_told_apart():
    paper, released = Params.load(ROOT / "params/paper.yaml"), Params.load(ROOT / "params/released.yaml")
    assert (paper.learning_rate, paper.of_trl("scale_rewards"), paper.gate_reward) == (2e-6, "none", "total")
    assert [paper.trl[name] for name in ("epsilon", "epsilon_high", "delta")] == [1.0, 0.2, 1.2]
    assert (released.trl["scale_rewards"], released.distill_beta, released.injected_per_group) == ("group", 0.5, 2)


def test_resolved_yaml_reads_back_and_repeats_the_run(write):
    params = Params(tau=0.5, learning_rate=1e-6, data_root="weird: 'näme' # x", run_dir="somewhere")
    again = Params.load(write(params.to_yaml()))
    assert again.run_dir == ""
    assert again.hash == params.hash
    assert again.replace(run_dir="somewhere") == params


@given(st.text(min_size=1).filter(str.strip), st.floats(1e-9, 1.0))
def test_any_text_and_number_survive_yaml(tmp_path_factory, text, number):
    path = tmp_path_factory.getbasetemp() / "roundtrip.yaml"
    path.write_text(Params(data_root=text, learning_rate=number).to_yaml(), encoding="utf-8")
    again = Params.load(path)
    assert (again.data_root, again.learning_rate) == (text, number)


def test_a_value_that_does_not_fit_is_told_with_its_file(write):
    path = write("tau: x\n")
    with pytest.raises(ParamError, match=rf"tau must be a number, got 'x' \(in {path.name}\)"):
        Params.load(path)
    assert Params.load(path, {"tau": 0.5}).tau == 0.5


def test_scientific_notation_in_yaml_is_a_number(write):
    assert Params.load(write("learning_rate: 1e-6\n")).learning_rate == 1e-6
    assert Params.load(write("learning_rate: 1.5E+0\n")).learning_rate == 1.5


def test_yaml_yes_is_no_boolean(write):
    with pytest.raises(ParamError, match="thinking must be True or False, got 'yes'"):
        Params.load(write("thinking: yes\n"))


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("taw: 1\n", "taw in some.yaml is not a parameter; the nearest is tau"),
        ("tau: 1\ntau: 0\n", "tau appears twice in some.yaml"),
        ("- tau\n", "must hold one `name: value` per line"),
        ("tau: [1\n", "some.yaml is not YAML"),
        ("tau: ~\n", "tau in some.yaml has no value"),
        ("tau:\n", "tau in some.yaml has no value"),
        ("tau: [1]\n", r"tau must be a number, got \[1\]"),
        ("run_dir: x\n", "run_dir belongs to one run"),
        ("tau: .nan\n", "tau must be a finite number, got nan"),
        ("learning_rate: .inf\n", "learning_rate must be at least 0, got inf"),
        ("1: 2\n", "1 in some.yaml is not a parameter"),
    ],
)
def test_a_bad_file_is_one_sentence(write, text, match):
    with pytest.raises(ParamError, match=match) as caught:
        Params.load(write(text))
    assert "\n" not in str(caught.value)


def test_an_empty_file_is_the_defaults_and_a_missing_one_an_error(write, tmp_path):
    assert Params.load(write("# nothing\n")) == Params()
    with pytest.raises(ParamError, match=r"nowhere\.yaml cannot be read"):
        Params.load(tmp_path / "nowhere.yaml")


# -- values


def test_overrides_beat_the_file_and_none_means_as_in_the_file(write):
    file = write("tau: 0\nseed: 3\n")
    params = Params.load(file, {"tau": 1, "seed": None})
    assert (params.tau, params.seed) == (1.0, 3)


def test_an_integer_widens_to_float_and_nothing_else_changes_type():
    assert isinstance(Params.load(None, {"tau": 1}).tau, float)
    bad("seed must be a whole number, got 1.0", seed=1.0)
    bad("seed must be a whole number, got True", seed=True)
    bad("tau must be a number, got True", tau=True)
    bad("tau must be a number, got '1'", tau="1")
    bad("thinking must be True or False, got 1", thinking=1)
    bad("thinking must be True or False, got 'true' .*capital", thinking="true")
    bad("student must be a text, got 2", student=2)


def test_unknown_names_name_the_nearest():
    bad("taw is not a parameter; the nearest is tau", taw=1)
    bad("learningrate is not a parameter; the nearest is learning_rate", learningrate=1)
    bad("zzzzzz is not a parameter; `kepo params` lists them", zzzzzz=1)
    with pytest.raises(ParamError, match="nearest is tau"):
        Params().replace(taw=1)


@pytest.mark.parametrize("tau", [-0.1, 1.01, math.nan, math.inf])
def test_tau_outside_the_gate_signal_is_refused(tau):
    bad("tau must", tau=tau)


def test_tau_range_follows_the_gate_signal():
    assert Params(tau=2, gate_reward="total").tau == 2.0
    bad("between 0 and 1, the largest accuracy reward", tau=2)
    bad("between 0 and 2, the largest total reward", tau=3, gate_reward="total")


def test_a_step_needs_as_many_train_items():
    bad(r"train_items must be at least prompts_per_step \(8\), enough for one step, got 7", train_items=7)
    assert Params(train_items=8).train_items == Params(train_items=1, method="none").train_items + 7


def test_rules_between_parameters():
    bad("explore needs thinking", thinking=False)
    assert Params(thinking=False, explore=False).method_name == "kepo-ke-tau1-nothink"
    bad(r"injected_per_group must be smaller than group_size \(8\)", injected_per_group=8)
    assert Params(injected_per_group=7).injected_per_group == 7
    bad(r"prompts_per_step must be a multiple of prompts_per_device × processes \(8 × 1\), got 12", prompts_per_step=12)
    bad(r"prompts_per_device × processes \(2 × 8\), got 8", prompts_per_device=2, processes=8)
    bad("vllm_server_base_url must be set for vllm_mode server", use_vllm=True, vllm_mode="server")
    bad("use_vllm samples rollouts for method kepo", use_vllm=True, method="gkd")
    bad("use_vllm has no engine while method sft", use_vllm=True, method="sft", thinking=False, curve_steps=5)
    bad("max_steps must be at least 1, got 0", max_steps=0)
    bad("eval_samples is 3 but eval_temperature is 0", eval_samples=3)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("group_size", 1),
        ("train_items", 0),
        ("top_p", 0),
        ("top_p", 1.5),
        ("temperature", 0),
        ("num_iterations", 0),
        ("max_completion_length", 0),
        ("save_steps", -1),
        ("epochs", 0),
        ("learning_rate", -1),
        ("distill_beta", 1.1),
        ("rejection_budget", 0),
        ("max_steps", -2),
        ("seed", -1),
    ],
)
def test_numbers_out_of_range_are_refused(name, value):
    bad(f"^{name} must be", **{name: value})


@pytest.mark.parametrize("name", [name for name, f in FIELDS.items() if "choices" in f.metadata])
def test_choices_are_closed(name):
    bad(f"^{name} must be one of", **{name: "no such choice"})


def test_supervision_has_no_reasoning_to_teach():
    for changes in ({"method": "sft"}, {"method": "gkd", "gkd_lambda": 0.5}):
        bad("learns from the right answers .* set thinking to False", **changes)
        Params(**changes, thinking=False)  # only KEPO explores


def test_an_empty_path_is_refused():
    bad("data_root must not be empty", data_root=" ")


def test_choices_agree_with_the_modules_that_use_them():
    assert FIELDS["hint_context"].metadata["choices"] == HINT_CONTEXTS


# -- identity


@pytest.mark.parametrize("name", sorted(FIELDS))
def test_the_hash_moves_with_what_changes_results_and_only_with_it(name):
    sizes = {"group_size": 4, "prompts_per_device": 2, "prompts_per_step": 12, "injected_per_group": 1}
    base = Params(explore=False, tau=0.0, eval_temperature=1, **sizes)
    if name.startswith("teacher_") and name != "teacher_quantization":  # a served teacher's: one needs the other
        base = base.replace(teacher_url="http://host/v1", teacher_top_k=5)
    (kind, _), value = kind_of(Params, name), getattr(base, name)
    if kind is bool:
        other = not value
    elif name in ("gate_reward", "exploration_reward"):
        other = "total"
    elif choices := FIELDS[name].metadata.get("choices"):
        other = next(choice for choice in choices if choice not in (value, "sft"))  # sft does not think
    else:
        other = {str: lambda: value + "x", int: lambda: value + 2, float: lambda: value * 0.5 + 0.03}[kind]()
    changed = base.replace(**{name: other})
    assert (changed.hash == base.hash) == (name in ("results_dir", "run_dir", "teacher_url"))


def test_method_names():
    assert Params().method_name == "kepo-tau1"
    assert Params(tau=0).method_name == "kepo-tau0"
    assert Params(tau=0.5, explore=False).method_name == "kepo-ke-tau0.5"
    assert Params(distill=False).method_name == "explore-only"
    assert Params(distill=False, explore=False).method_name == "grpo"
    assert Params(method="sft", thinking=False).method_name == "sft-nothink"
    assert Params(method="gkd", thinking=False, gkd_lambda=0.5).method_name == "gkd-lambda0.5-nothink"
    assert Params(method="gkd").method_name == "gkd-lambda1" and Params(method="none").method_name == "zero-shot"


def test_params_cannot_be_changed_in_place():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Params().tau = 0  # type: ignore[misc]


# -- notebooks


def test_a_notebook_namespace_is_read_and_its_furniture_ignored():
    namespace = {
        "tau": 0,
        "seed": None,
        "In": ["", "tau = 0"],
        "Out": {},
        "_": 5,
        "__name__": "__main__",
        "math": math,
        "Path": Path,
        "teacher": types.SimpleNamespace(),  # a loaded model under a parameter's name
        "helper": lambda: None,
    }
    params = Params.from_notebook(namespace)
    assert (params.tau, params.seed, params.teacher) == (0.0, 0, "embedded:teacher")


def test_a_misspelt_notebook_parameter_names_the_nearest():
    with pytest.raises(ParamError, match="taw in the notebook is not a parameter; the nearest is tau"):
        Params.from_notebook({"taw": 1})
    for odd in (None, [1], {"a": 1}, "x", 1.5, True):
        with pytest.raises(ParamError, match="taw in the notebook"):
            Params.from_notebook({"taw": odd})


def test_a_cell_can_be_run_again_after_later_cells_left_variables():
    cells = ["", "# Parameters\ntau = 0\nseed: int = 1", "rows = 3\nprint(rows)", "n = len(x)", "def broken(:"]
    namespace = {"In": cells, "tau": 0, "seed": 1, "rows": 3, "n": 4}
    assert Params.from_notebook(namespace).seed == 1
    with pytest.raises(ParamError, match="taw in the notebook"):
        Params.from_notebook({**namespace, "In": [*cells, "# Parameters\ntaw = -1"], "taw": -1})


def test_a_notebook_takes_any_field_of_trl_and_numbers_that_papermill_reads_as_texts():
    injected = "# Parameters\nlearning_rate = '2e-6'\ntemperature = '5e-1'\nloss_type = 'dapo'"
    namespace = {"In": ["", injected], "learning_rate": "2e-6", "temperature": "5e-1", "loss_type": "dapo", "beta": 3}
    params = Params.from_notebook(namespace)
    assert (params.learning_rate, dict(params.trl) | {"temperature": 0.5, "loss_type": "dapo"}) == (2e-6, params.trl)
    assert "beta" not in params.trl  # a variable of a later cell
    with pytest.raises(ParamError, match="temperatur in the notebook is not a parameter; the nearest is temperature"):
        Params.from_notebook({"temperatur": 1})


def test_a_notebook_with_parameters_of_its_own_refuses_others():
    cells = ["", "rows = 'all'\nslots = 0", "# Parameters\nslots = 2\n", "x = len(y)"]
    check_names({"In": cells, "rows": "all", "slots": 2})
    with pytest.raises(ParamError, match=r"slotz in the notebook is not a parameter; the nearest is slots$"):
        check_names({"In": [*cells, "# Parameters\nslotz = 3"]})
    with pytest.warns(UserWarning, match=r"^slotz \(is slots meant\?\) is set in a cell of its own and is not taken"):
        check_names({"In": [*cells, "slotz = 3"]})
    with pytest.raises(ParamError, match=r"zzz in the notebook is not a parameter; expected one of rows, slots$"):
        check_names({"In": [*cells, "# Parameters\nzzz = 3"]})


@pytest.mark.parametrize("place", [1, 2, 3])
def test_a_scratch_cell_is_the_users_own_business(place):
    """Above the parameters cell, before it is read and after."""
    cells = ["", "tau = 0\nseed = 1", "print(tau)"]
    scratch = "k = 3\nrows = [1, 2]\nsize = 2 * 8"
    values = {"k": 3, "rows": [1, 2], "size": 16}
    cells.insert(place, scratch)
    params = Params.from_notebook({"In": cells, "tau": 0, "seed": 1, **values})
    assert (params.tau, params.seed, dict(params.trl)) == (0.0, 1, dict(Params().trl))
    cells = ["", "rows = 'all'\nslots = 0\nstudy = 1\nmake_runs = True", "print(rows)"]
    cells.insert(place, "k = 3\nj = 4")
    check_names({"In": cells})


@pytest.mark.parametrize("source", ["sed = 1", "lerning_rate = 1e-4", "temperatur = 0.5", "epoch = 3"])
def test_a_misspelt_parameter_is_refused_where_parameters_are_given_and_warned_of_elsewhere(source):
    name, value = source.split(" = ")
    values = {"tau": 0, name: float(value)}
    for cells in (["", f"tau = 0\n{source}"], ["", "tau = 0", f"# Parameters\n{source}"]):
        with pytest.raises(ParamError, match=f"^{name} in the notebook is not a parameter; the nearest is "):
            Params.from_notebook({"In": cells, **values})
    for cells in (["", "tau = 0", source], ["", source, "tau = 0"]):
        with pytest.warns(
            UserWarning, match=rf"^{name} \(is \w+ meant\?\) is set in a cell of its own and is not taken"
        ):
            assert Params.from_notebook({"In": cells, **values}) == Params(tau=0.0)


@pytest.mark.parametrize("source", ["beta = 0.5", "k = 3\nbeta = 0.5", "optim = [1, 2]", "num_generations = 4",
                                    "temperature = 'hot'", "seed = 1\nk = 3\nbeta = 2"])  # fmt: skip
def test_a_scratch_variable_that_is_called_like_a_field_of_trls_is_none(source):
    values = parameter_cells([source])
    with pytest.warns(
        UserWarning, match=r"^(beta|optim|num_generations|temperature) is set in a cell of its own and is"
    ):
        params = Params.from_notebook({"In": ["", "tau = 0\nsplit = 'image'", source], "tau": 0, **values})
    assert params == Params(tau=0.0, seed=values.get("seed", 0))


def test_the_parameters_cell_counts_as_it_was_executed_last():
    cells = ["", "tau = 0\nseed = 1\nbeta = 0.5", "tau = 0\nseed = 1\ntemperature = 0.5"]
    values = {"tau": 0, "seed": 1, "beta": 0.5, "temperature": 0.5}
    with pytest.warns(UserWarning, match="^beta is set"):
        params = Params.from_notebook({"In": cells, **values})
    assert params.of_trl("beta") == 0 and params.of_trl("temperature") == 0.5


def test_a_misspelling_is_forgiven_once_its_cell_was_mended_and_executed_again():
    cells, values = ["", "tau = 0\nsed = 1", "tau = 0\nseed = 1"], {"tau": 0, "sed": 1, "seed": 1}
    assert Params.from_notebook({"In": cells, **values}).seed == 1
    with pytest.raises(ParamError, match="sed in the notebook"):  # papermill's cell does not correct the misspelling
        Params.from_notebook({"In": [*cells[:2], "# Parameters\ntau = 0\nseed = 1"], **values})
    with pytest.raises(ParamError, match="sed in the notebook"):
        Params.from_notebook({"In": [*cells[:2], "seed = 1"], **values})


# -- places


def test_the_root_is_found_from_a_folder_below_and_from_elsewhere(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT / "notebooks")
    assert project_root() == ROOT
    assert resolve("params/smoke.yaml") == ROOT / "params/smoke.yaml"
    monkeypatch.chdir(tmp_path)
    assert project_root() == ROOT
    (tmp_path / "mine.yaml").touch()
    assert resolve("mine.yaml") == tmp_path / "mine.yaml"
    assert resolve(tmp_path / "x") == tmp_path / "x"


# -- TRL's own


def test_any_field_of_trl_is_taken_under_its_name(write):
    params = Params.load(None, TRL)
    assert {name: params.of_trl(name) for name in TRL} == TRL and Params().of_trl("temperature") == 1.0
    assert Params.load(write(params.to_yaml())) == params == Params.of_run(write(params.to_yaml()))
    assert params.hash != Params().hash and params.replace(seed=1).trl == params.trl
    arguments = params.to_arguments()
    assert set(arguments) - {"-p"} == {*TRL, *map(str, TRL.values())}


def test_a_value_that_is_trls_default_is_not_a_change():
    assert Params.load(None, {"temperature": 1, "beta": 0.0, "scale_rewards": "none"}) == Params()
    assert Params.load(None, {"beta": 0.1}).replace(beta=0.0) == Params()


def test_a_field_of_trl_that_does_not_fit_is_refused_at_once():
    bad("num_generations is set by the study itself: set group_size instead", num_generations=4)
    bad("run_name is set by the study itself: leave it out", run_name="mine")
    bad("temperature must be a number, as in TRL's GRPOConfig, got True", temperature=True)
    bad("scale_rewards is 'x', expected one of none", scale_rewards="x")
    bad("cosin is not a valid SchedulerType|lr_scheduler_type", lr_scheduler_type="cosin", beta=0.1)
    bad("gate_compare is not a parameter .it was removed.: gate below is its lt", gate_compare="lt")
    bad("zero_variance is not a parameter .it was removed.: for a larger policy term", zero_variance="drop")
    bad("max_steps must be a whole number, got 'x'", max_steps="x")


def test_a_compiler_that_is_asked_for_is_asked_for_by_its_own_run_alone(monkeypatch):
    """transformers writes it into the environment, which all runs of a study would inherit."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    monkeypatch.delenv("ACCELERATE_DYNAMO_MODE", raising=False)
    Params.load(None, {"torch_compile": True, "torch_compile_mode": "default"})
    assert os.environ["ACCELERATE_DYNAMO_BACKEND"] == "no" and "ACCELERATE_DYNAMO_MODE" not in os.environ


def test_trls_defaults_that_a_study_changes_are_fields_of_trl():
    config = params_trl._config()
    assert {field.name for field in dataclasses.fields(config)} >= {*params_trl.DEFAULTS, *params_trl.SET_BY}
    assert not {*params_trl.DEFAULTS, *params_trl.SET_BY} & {*FIELDS}


def test_what_differs_from_a_notebooks_cell_is_given_to_it():
    params = Params(tau=0.0, seed=3)
    assert params.differing() == {"tau": 0.0, "seed": 3}
    assert params.differing({"tau": 0.0, "seed": 0, "beta": 0.5, "epochs": None}) == {"seed": 3, "beta": 0.0}
    assert Params.load(None, {"seed": 3}, cell={"tau": 0.0, "seed": 1}) == params


def test_none_is_trls_default_and_an_unknown_name_is_refused_with_it_too():
    assert Params.load(None, {"delta": None}, cell={"delta": 1.2, "epsilon_high": None}) == Params()
    assert Params.from_notebook({"epsilon_high": None, "tau": None}) == Params()
    assert Params().differing({"epsilon_high": 0.3}) == {"epsilon_high": None}
    bad("nonsense is not a parameter", nonsense=None)


def test_what_a_run_folder_shows_holds_no_token_and_the_study_keeps_its_own_fields():
    for name in (
        "hub_token",
        "logging_strategy",
        "eval_strategy",
        "do_eval",
        "remove_unused_columns",
        "log_completions",
    ):
        bad(f"{name} is set by the study itself: leave it out", **{name: "x"})
    bad("deepspeed is set by the study itself: set accelerate_config instead", deepspeed="x")


@pytest.mark.parametrize(
    ("name", "near"),
    [("temprature", "temperature"), ("max_step", "max_steps"), ("scale_reward", "scale_rewards"), ("bta", "beta"),
     ("save_step", "save_steps"), ("epsilon_hgh", "epsilon_high"), ("learningrate", "learning_rate")],
)  # fmt: skip
def test_the_nearest_name_is_found_among_all(name, near):
    bad(f"{name} is not a parameter; the nearest is {near}", **{name: 1})


def test_a_name_that_went_says_what_to_use():
    bad(r"lr_scheduler is not a parameter \(it was removed\): set lr_scheduler_type", lr_scheduler="cosine")
    bad(r"ratio_clip is not a parameter \(it was removed\): for eq5 set epsilon 1", ratio_clip="eq5")


def test_fields_of_trl_that_fail_late_or_never_are_refused_at_once():
    bad("vllm_mode must be one of colocate, server", vllm_mode="nope")
    bad("vllm_gpu_memory_utilization must be greater than 0 and at most 1", vllm_gpu_memory_utilization=2.0)
    bad("generation_batch_size", generation_batch_size=3)


def test_a_parameters_cell_may_compute_with_constants_and_do_nothing_else(tmp_path):
    def notebook(source):
        path = tmp_path / "n.ipynb"
        cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source}
        path.write_text(json.dumps({"cells": [cell]}))
        return path

    assert tagged_cell(notebook("a = 3e-4 / 2\nb = float('inf')  # b\nc = -1\nd = [1, 'x']")) == {
        "a": 1.5e-4, "b": math.inf, "c": -1, "d": [1, "x"]
    }  # fmt: skip
    for source in ("a = b", "a = 1\nprint(a)", "a = open('x')", "a = 9 ** 9", "a = 1 / 0"):
        with pytest.raises(ParamError, match=r"the parameters cell of n\.ipynb does more than set names to constants"):
            tagged_cell(notebook(source))
    cells = ["", "# Parameters\noff_policy_mask_threshold = float('inf')\nloss_type = 'dapo'\nnonsense = 3"]
    namespace = {"In": cells, "off_policy_mask_threshold": math.inf, "loss_type": "dapo", "nonsense": 3}
    with pytest.raises(ParamError, match="nonsense in the notebook is not a parameter"):
        Params.from_notebook(namespace)


def test_equal_parameters_hash_alike_and_nothing_is_deleted():
    assert hash(Params()) == hash(Params.load(None, {"beta": 0})) and len({Params(), Params(), Params(tau=0.0)}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        del Params().tau
    assert pickle.loads(pickle.dumps(Params(tau=0.5))) == Params(tau=0.5)
    assert Params.load(None, {"activation_checkpointing": False}) == Params()
