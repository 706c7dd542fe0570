"""Loading: what is saved comes back, and what does not fit is refused by name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from kepo_core.data.images import load_image
from kepo_core.data.loading import load_questions
from kepo_core.data.phantom import GRADES, KINDS, PLACES, write_phantom
from kepo_core.data.records import MODALITIES, Question
from kepo_core.errors import ParamError
from kepo_core.experiment.evaluation import evaluate
from kepo_core.experiment.models import check_same_vocabulary, load_model, load_processor, resolve, save_embedded
from kepo_core.plan.architecture import load_config
from kepo_core.task import prompts
from kepo_core.testbed.embedded import LETTERS, build_model, build_processor


def test_saved_model_and_processor_come_back(tmp_path: Path, tiny_model) -> None:
    model, processor = tiny_model(3), build_processor()
    before = model.state_dict()["model.language_model.norm.weight"].clone()
    save_embedded(model, processor, tmp_path)
    assert {p.suffix for p in tmp_path.iterdir()} <= {".json", ".safetensors", ".jinja"}
    again, reloaded = load_model(str(tmp_path)), load_processor(str(tmp_path))
    assert all(p.dtype == torch.float32 and p.requires_grad for p in again.parameters())
    torch.testing.assert_close(again.state_dict()["model.language_model.norm.weight"].cpu(), before)
    messages = prompts.vqa_messages("What shape is the finding?", ["ring", "disc"], thinking=True)
    rendered = [
        p.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) for p in (processor, reloaded)
    ]
    assert rendered[0] == rendered[1]
    assert reloaded.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    assert reloaded.image_processor.patch_size == processor.image_processor.patch_size


def test_prompts_are_padded_on_the_left_whatever_was_saved(tmp_path: Path, tiny_model) -> None:
    processor = build_processor()
    processor.tokenizer.padding_side = "right"
    save_embedded(tiny_model(), processor, tmp_path)
    assert load_processor(str(tmp_path)).tokenizer.padding_side == "left"


def test_trained_weights_are_float32_masters_whatever_the_precision(tmp_path: Path, tiny_model) -> None:
    save_embedded(tiny_model(), build_processor(), tmp_path)
    student = load_model(str(tmp_path), "student", precision="bf16")
    assert {p.dtype for p in student.parameters()} == {torch.float32}


def test_a_teacher_is_frozen(tmp_path: Path, tiny_model) -> None:
    save_embedded(tiny_model(), build_processor(), tmp_path)
    teacher = load_model(str(tmp_path), "teacher", trained=False, precision="bf16")
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in teacher.parameters())


TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}


def qwen25(folder: Path) -> None:
    """A random Qwen2.5-VL, the architecture of HuatuoGPT-Vision-7B-Qwen2.5VL, under the embedded tokenizer."""
    processor = build_processor()
    tokenizer = processor.tokenizer
    text = {**TEXT, "num_key_value_heads": 2, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 64,
              "patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 1, "window_size": 32,
              "fullatt_block_indexes": [1]}  # fmt: skip
    tokens = {f"{name}_token_id": getattr(processor, f"{name}_token_id")
              for name in ("image", "video", "vision_start", "vision_end")}  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True, **tokens)
    save_embedded(Qwen2_5_VLForConditionalGeneration(config), processor, folder)


def llava(folder: Path) -> None:
    """A random LLaVA: another family, whose processor is transformers' own."""
    tokenizer = build_processor().tokenizer
    text = {**TEXT, "model_type": "llama", "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}  # fmt: skip
    vision = {**TEXT, "model_type": "clip_vision_model", "hidden_size": 32, "image_size": 64, "patch_size": 16}
    config = LlavaConfig(text_config=text, vision_config=vision, vision_feature_layer=-1, tie_word_embeddings=True,
                         image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"))  # fmt: skip
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 64, "width": 64}
    LlavaProcessor(
        CLIPImageProcessorPil(size=size, crop_size=size), tokenizer, patch_size=16, image_token="<|image_pad|>",
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
        chat_template=build_processor().chat_template,
    ).save_pretrained(folder)  # fmt: skip


@pytest.mark.parametrize("save", [qwen25, llava])
def test_another_family_answers_from_disk(tmp_path: Path, save: Callable[[Path], None]) -> None:
    torch.manual_seed(0)
    save(tmp_path / "model")
    write_phantom(tmp_path / "data", 0, {"MRI": 3})
    questions = load_questions(tmp_path / "data")[:5]
    model, processor = load_model(str(tmp_path / "model")), load_processor(str(tmp_path / "model"))
    asked = {"thinking": False, "max_tokens": 5}
    together = evaluate(model, processor, questions, **asked, batch_size=5)
    assert [answer.question_id for answer in together] == [question.id for question in questions]
    assert together == evaluate(model, processor, questions, **asked, batch_size=1)
    pictures = (load_image(questions[0].image), Image.new("RGB", (64, 64), "white"))
    seen, blank = (read(model, processor, questions[0], picture) for picture in pictures)
    assert not torch.allclose(seen, blank)  # it sees the picture


def read(model: Any, processor: Any, question: Question, picture: Image.Image) -> torch.Tensor:
    """Next-token logits behind the prompt."""
    messages = prompts.vqa_messages(question.question, question.options, thinking=False)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(text=[text], images=[[picture]], return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits[0, -1]


@pytest.mark.parametrize("name", ["embedded:pupil", "/no/such/folder", "./nowhere", "a/b/c"])
def test_what_is_no_model_is_named(name: str) -> None:
    with pytest.raises(ParamError, match="teacher is"):
        resolve(name, "teacher")


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ParamError, match=r"no config\.json"):
        resolve(str(tmp_path), "student")


def test_other_vocabulary_is_refused() -> None:
    student, teacher = build_processor(), build_processor()
    check_same_vocabulary(student, teacher)
    teacher.tokenizer.add_tokens(["zzz"])
    with pytest.raises(ParamError, match="'zzz'"):
        check_same_vocabulary(student, teacher)
    student.tokenizer.add_tokens(["yyy"])  # as many, and others
    with pytest.raises(ParamError, match="'yyy'"):
        check_same_vocabulary(student, teacher)


def test_tokenizer_behaves_like_qwen3() -> None:
    tokenizer = build_processor().tokenizer
    text = "<think>The finding is a dark bar.</think>\n<answer>B</answer>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text  # <think> survives, as in Qwen3
    assert tokenizer.convert_tokens_to_ids("<think>") in ids
    assert "<answer>" not in tokenizer.get_vocab()
    assert tokenizer.decode(tokenizer("ünïcode ☃ text")["input_ids"]) == "ünïcode ☃ text"
    for letter in LETTERS:  # an option's mark is one token, in its line and behind a word; an answer is the bare letter
        mark, behind, bare = (tokenizer.convert_tokens_to_ids(t) for t in (f"{letter})", f" ({letter})", letter))
        assert mark in tokenizer(f"\n{letter}) ring")["input_ids"]
        assert behind in tokenizer(f"a dark ring ({letter}).")["input_ids"]
        assert bare in tokenizer(f"<answer>{letter}</answer>")["input_ids"]
    for word in (*PLACES, *GRADES, *MODALITIES, *KINDS):  # one token, so that it can be found again
        assert tokenizer(f"A) {word}")["input_ids"][1:] == tokenizer(f" {word}")["input_ids"]
        assert len(tokenizer(f" {word}")["input_ids"]) == 1, word


def test_seed_fixes_weights_and_leaves_the_global_generator() -> None:
    state = torch.get_rng_state()
    one, two, other = build_model("test", 1), build_model("test", 1), build_model("test", 2)
    assert torch.equal(torch.get_rng_state(), state)
    weights = [m.state_dict()["lm_head.weight"] for m in (one, two, other)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize(
    ("text", "said"), [('{"model_type": ', "not a valid JSON"), ("[]", "model_type"), ('{"model_type": "x"}', "`x`")]
)
def test_a_broken_configuration_is_one_sentence(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "config.json").write_text(text)
    for read in (load_processor, load_config):
        with pytest.raises(ParamError, match=rf"teacher is '.*', whose config.json cannot be read: .*{said}") as caught:
            read(str(tmp_path), "teacher")
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
