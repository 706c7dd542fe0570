"""KEPO (arXiv 2602.00400) in one file, to read top to bottom: Algorithm 1 and Eq. 7, from data to a trained model.

The task: "two plus three is" -> "five". The teacher knows all sums, the student only those up to eight: on most others
all its rollouts fail. Suffixes: _B sequences (the G of a group adjacent), _T completion tokens, _V vocabulary.
"""

import random

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

G, BUDGET, TAU, STEPS, LENGTH = 8, 5, 1.0, 80, 8  # group size, Algorithm 1's B, gate threshold, steps, tokens
TO_TEN = "zero one two three four five six seven eight nine ten"
NUMBERS = f"{TO_TEN} eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty".split()
WORDS = f"<pad> <end> {' '.join(NUMBERS)} plus is . : the answer <hint> </hint> hint more than so".split()
ASKING, TELLING = "{x} . the answer is {y} . hint :", "{x} . {h} . the answer is {y} . so"  # contexts of Eq. 8, Eq. 9
words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<end>")


def schooled(lessons: list[tuple[str, str]], steps: int) -> Qwen3ForCausalLM:
    """A new model, trained on (prompt, completion) pairs; at scale, a pretrained checkpoint."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    model = Qwen3ForCausalLM(Qwen3Config(vocab_size=len(WORDS), num_attention_heads=4, num_key_value_heads=4, **shape))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        pairs = [(x, f"{y} <end>") for x, y in random.sample(lessons, 64)]
        batch = tokenizer(pairs, padding=True, return_tensors="pt", return_token_type_ids=True)
        labels = batch.input_ids.where(batch.pop("token_type_ids") == 1, -100)  # type 1: the completion
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def sample(model: Qwen3ForCausalLM, prompts: list[str]) -> tuple[Tensor, Tensor, list[str]]:
    """One completion per prompt at temperature 1: ids_BT, mask_BT (1 up to the end-of-text token, included), texts."""
    x = tokenizer(prompts, return_tensors="pt")  # no padding: prompts of one kind have equal lengths
    both = model.generate(**x, do_sample=True, top_k=0, max_new_tokens=LENGTH, pad_token_id=0, eos_token_id=1)
    ids_BT = torch.nn.functional.pad(both, (0, x.input_ids.shape[1] + LENGTH - both.shape[1]))[:, -LENGTH:]
    ends_BT = ids_BT == tokenizer.eos_token_id
    return ids_BT, (ends_BT.cumsum(1) <= ends_BT).long(), tokenizer.batch_decode(ids_BT, skip_special_tokens=True)


def reward(texts: list[str], answers: list[str]) -> Tensor:
    """r(y_i), (B,): 1 if the completion is the right answer, else 0."""
    return torch.tensor([float(text == answer) for text, answer in zip(texts, answers, strict=True)])


def rollout(student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, batch: list[tuple[str, str]]) -> tuple[Tensor, ...]:
    """Algorithm 1 for each (x, y) of a batch: ids_BT, mask_BT, rewards_B, and own_B, the rewards before exploration."""
    ids_BT, mask_BT, texts = sample(student, [x for x, _ in batch for _ in range(G)])  # line 3
    own_B = reward(texts, [y for _, y in batch for _ in range(G)])
    rewards_B = own_B.clone()
    for group, (x, y) in enumerate(batch):
        if own_B.view(-1, G)[group].max() > 0:  # lines 4 and 5: the group does not change
            continue
        hint = sample(teacher, [ASKING.format(x=x, y=y)])[2][0]  # line 7, Eq. 8
        for _ in range(BUDGET):  # line 8
            draw_1T, draw_mask_1T, texts = sample(student, [TELLING.format(x=x, h=hint, y=y)])  # line 9, Eq. 9
            if reward(texts, [y]) > 0:  # line 10
                i = group * G + random.randrange(G)  # lines 11 and 15: it replaces one original
                ids_BT[i], mask_BT[i], rewards_B[i] = draw_1T[0], draw_mask_1T[0], 1.0
                break  # line 12; if the budget runs out first, no trajectory is added (line 16)
    return ids_BT, mask_BT, rewards_B, own_B


def divergence(student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, mask_BT: Tensor) -> Tensor:
    """D(pi_T || pi_theta)(y_i | x) of Eq. 7, (B,): forward KL over the vocabulary, mean over completion tokens."""
    log_s, log_t = student_logits_BTV.log_softmax(-1), teacher_logits_BTV.detach().log_softmax(-1)
    return ((log_t.exp() * (log_t - log_s)).sum(-1) * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1)


def kepo_loss(student_logits_BTV, teacher_logits_BTV, ids_BT, mask_BT, rewards_B, group_size, tau) -> Tensor:
    """-J of Eq. 7, a scalar, with beta = 0: without the KL to a reference policy."""
    advantages_B = rewards_B - rewards_B.view(-1, group_size).mean(1).repeat_interleave(group_size)  # Eq. 6
    logps_BT = student_logits_BTV.log_softmax(-1).gather(-1, ids_BT.unsqueeze(-1)).squeeze(-1)
    ratio_BT = (logps_BT - logps_BT.detach()).exp()  # Eq. 3, 5: its value is 1, as each rollout is used for one step
    policy_B = advantages_B * (ratio_BT * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1)  # w A of Eq. 2
    gated_B = (rewards_B >= tau) * divergence(student_logits_BTV, teacher_logits_BTV, mask_BT)  # the gate of Eq. 7
    return -policy_B.mean() + gated_B.mean()


def main(seed: int = 0) -> None:
    """Make the sums and both models, then train the student."""
    set_seed(seed)
    plain = [(f"{NUMBERS[a]} plus {NUMBERS[b]} is", NUMBERS[a + b]) for a in range(1, 11) for b in range(1, 11)]
    hints = [f"<hint> one more than {NUMBERS[NUMBERS.index(y) - 1]} </hint>" for _, y in plain]
    asked = [(ASKING.format(x=x, y=y), h) for (x, y), h in zip(plain, hints, strict=True)]
    told = [(TELLING.format(x=x, h=h, y=y), y) for (x, y), h in zip(plain, hints, strict=True)]
    teacher = schooled(plain * 2 + asked, steps=300).requires_grad_(False)
    student = schooled([(x, y) for x, y in plain if y in NUMBERS[:9]] * 2 + told, steps=200)
    prompts, answers = zip(*plain * 4, strict=True)
    before = reward(sample(student, prompts)[2], answers).mean()
    print("step  own accuracy  groups failed  groups rescued  gate rate  divergence")
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3)
    for step in range(1, STEPS + 1):
        batch = random.sample(plain, 32)
        ids_BT, mask_BT, rewards_B, own_B = rollout(student, teacher, batch)
        x = tokenizer([x for x, _ in batch for _ in range(G)], return_tensors="pt").input_ids
        both = torch.cat([x, ids_BT], 1)  # both models score under the plain x, also draws made with a hint
        student_BTV, teacher_BTV = (model(both).logits[:, -LENGTH - 1 : -1] for model in (student, teacher))
        kepo_loss(student_BTV, teacher_BTV, ids_BT, mask_BT, rewards_B, G, TAU).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 10 == 0:
            failed, rescued = (own_B.view(-1, G).amax(1) == 0).sum(), (rewards_B - own_B).sum()
            gate_B, kl_B = rewards_B >= TAU, divergence(student_BTV, teacher_BTV, mask_BT)
            row = f"{step:4}{own_B.mean():14.0%}{failed:15}{rescued:16.0f}{gate_B.float().mean():11.0%}"
            print(f"{row}{kl_B[gate_B].mean():12.3f}")
    after, best = (reward(sample(model, prompts)[2], answers).mean() for model in (student, teacher))
    print(f"sums right: student {before:.0%} before, {after:.0%} after; teacher {best:.0%}")


if __name__ == "__main__":
    main()
