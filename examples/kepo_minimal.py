"""KEPO (arXiv 2602.00400) in one file, for reading: Algorithm 1 and Eq. 7 from data to a trained model, no trainer.

The task is arithmetic in words: "two plus three is" -> "five". The teacher knows every sum. The student has learned
the small ones only; on most others all its rollouts fail, and rewards alone leave it nothing to learn from.
Shapes are suffixes: _B sequences (the G of a group side by side), _T completion tokens, _V vocabulary.
"""

import random
import re

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, set_seed

G, BUDGET, TAU, STEPS, LENGTH = 8, 5, 1.0, 120, 8  # group size, Algorithm 1's B, threshold, steps, completion tokens
TEENS = "eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen twenty"
NUMBERS = f"zero one two three four five six seven eight nine ten {TEENS}".split()
WORDS = ["<pad>", "<end>", *NUMBERS, *"plus is . : the answer <hint> </hint> hint more than so".split()]
ASKING, TELLING = "{x} . the answer is {y} . hint :", "{x} . hint : {h} . the answer is {y} . so"  # Eq. 8 and 9
vocabulary = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}))
vocabulary.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=vocabulary, pad_token="<pad>", eos_token="<end>")


def schooled(lessons: list[tuple[str, str]], steps: int) -> Qwen3ForCausalLM:
    """A new model taught (prompt, completion) pairs by supervised training; in earnest, a pretrained checkpoint."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16}
    config = Qwen3Config(vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=2, **heads)
    model = Qwen3ForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        pairs = map(list, zip(*random.sample(lessons, 64), strict=True))
        texts = tokenizer(*pairs, padding=True, return_tensors="pt", return_token_type_ids=True)
        labels = texts.input_ids.where(texts.pop("token_type_ids") == 1, -100)  # learn completions, not prompts
        model(**texts, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model


@torch.no_grad()
def sample(model: Qwen3ForCausalLM, prompts: list[str]) -> tuple[Tensor, Tensor]:
    """One completion per prompt at temperature 1: ids_BT, and mask_BT, 1 up to and with the end-of-text token."""
    x = tokenizer(prompts, return_tensors="pt")  # no padding: all prompts of a kind have the same length
    both = model.generate(**x, do_sample=True, top_k=0, max_new_tokens=LENGTH, pad_token_id=0, eos_token_id=1)
    ids_BT = torch.nn.functional.pad(both, (0, x.input_ids.shape[1] + LENGTH - both.shape[1]))[:, -LENGTH:]
    ended_BT = (ids_BT == tokenizer.eos_token_id).long()
    return ids_BT, (ended_BT.cumsum(1) - ended_BT == 0).long()


def reward(ids_BT: Tensor, answers: list[str]) -> Tensor:
    """r(y_i), (B,): 1 if the completion is the right answer, else 0."""
    texts = tokenizer.batch_decode(ids_BT, skip_special_tokens=True)
    return torch.tensor([float(text == answer) for text, answer in zip(texts, answers, strict=True)])


def rollout(student: Qwen3ForCausalLM, teacher: Qwen3ForCausalLM, batch: list[tuple[str, str]]) -> tuple[Tensor, ...]:
    """Algorithm 1 for each (x, y) of a batch: ids_BT, mask_BT, rewards_B, and the rewards before exploration."""
    ids_BT, mask_BT = sample(student, [x for x, _ in batch for _ in range(G)])  # line 3
    own_B = reward(ids_BT, [y for _, y in batch for _ in range(G)])
    rewards_B = own_B.clone()
    for group, (x, y) in enumerate(batch):
        if own_B.view(-1, G)[group].max() > 0:  # line 4
            continue  # line 5: the group stays as it is
        written = tokenizer.decode(sample(teacher, [ASKING.format(x=x, y=y)])[0][0])  # line 7, Eq. 8
        hint = re.search("<hint> (.*) </hint>", written)
        for _ in range(BUDGET if hint else 0):  # line 8
            draw_1T, drawn_1T = sample(student, [TELLING.format(x=x, h=hint[1], y=y)])  # line 9, Eq. 9
            if reward(draw_1T, [y]) > 0:  # line 10
                i = group * G + random.randrange(G)  # lines 11 and 15: it replaces one original, the rest stay
                ids_BT[i], mask_BT[i], rewards_B[i] = draw_1T[0], drawn_1T[0], 1.0
                break  # line 12; a budget spent in vain adds no trajectory (line 16)
    return ids_BT, mask_BT, rewards_B, own_B


def token_mean_kl(student_logits_BTV: Tensor, teacher_logits_BTV: Tensor, mask_BT: Tensor) -> Tensor:
    """D(pi_T || pi_theta)(y_i | x) of Eq. 7, (B,): forward KL over the vocabulary, mean over completion tokens."""
    log_s, log_t = student_logits_BTV.log_softmax(-1), teacher_logits_BTV.detach().log_softmax(-1)
    return ((log_t.exp() * (log_t - log_s)).sum(-1) * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1)


def kepo_loss(student_logits_BTV, teacher_logits_BTV, ids_BT, mask_BT, rewards_B, group_size, tau) -> Tensor:
    """-J_KEPO of Eq. 7 (its KL to a reference policy is left out: beta = 0), a scalar."""
    groups = rewards_B.view(-1, group_size)
    advantages_B = (groups - groups.mean(1, keepdim=True)).view(-1)  # Eq. 6
    logps_BT = student_logits_BTV.log_softmax(-1).gather(-1, ids_BT.unsqueeze(-1)).squeeze(-1)
    ratio_BT = (logps_BT - logps_BT.detach()).exp()  # Eq. 3 and 5: 1 in value, as one step follows each rollout
    policy_B = advantages_B * (ratio_BT * mask_BT).sum(-1) / mask_BT.sum(-1).clamp(min=1)  # Eq. 2
    gate_B = rewards_B >= tau  # the indicator of Eq. 7
    return -policy_B.mean() + (gate_B * token_mean_kl(student_logits_BTV, teacher_logits_BTV, mask_BT)).mean()


def main(seed: int = 0) -> None:
    """Make the world and school the models, then train the student with KEPO."""
    torch.set_num_threads(1)  # models this small only lose time to threads
    set_seed(seed)
    sums = [(a, b) for a in range(1, 11) for b in range(1, 11)]
    questions = [(f"{NUMBERS[a]} plus {NUMBERS[b]} is", NUMBERS[a + b]) for a, b in sums]
    hints = [f"one more than {NUMBERS[a + b - 1]}" for a, b in sums]
    plain = [(x, f"{y} <end>") for x, y in questions]
    asked = [(ASKING.format(x=x, y=y), f"<hint> {h} </hint> <end>") for (x, y), h in zip(questions, hints, strict=True)]
    told = [(TELLING.format(x=x, h=h, y=y), f"{y} <end>") for (x, y), h in zip(questions, hints, strict=True)]
    small = [text for text, (a, b) in zip(plain, sums, strict=True) if max(a, b) <= 5]
    teacher, student = schooled(plain + asked, TSTEPS), schooled(small * 2 + told, SSTEPS)

    def accuracy(model):
        return reward(sample(model, [x for x, _ in questions * 4])[0], [y for _, y in questions * 4]).mean().item()
    print(f"sums right before: student {accuracy(student):.0%}, teacher {accuracy(teacher):.0%}")
    print("step  own accuracy  failed  rescued  gate rate  divergence")
    optimizer = torch.optim.AdamW(student.parameters(), lr=LR)
    for step in range(1, STEPS + 1):
        batch = random.sample(questions, 16)
        ids_BT, mask_BT, rewards_B, own_B = rollout(student, teacher, batch)
        x = tokenizer([x for x, _ in batch for _ in range(G)], return_tensors="pt")
        both = {"input_ids": torch.cat([x.input_ids, ids_BT], 1), "attention_mask": torch.cat([x.attention_mask, mask_BT], 1)}
        student_logits_BTV = student(**both).logits[:, -LENGTH - 1 : -1]
        with torch.no_grad():
            teacher_logits_BTV = teacher(**both).logits[:, -LENGTH - 1 : -1]
        kepo_loss(student_logits_BTV, teacher_logits_BTV, ids_BT, mask_BT, rewards_B, G, TAU).backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            failed = own_B.view(-1, G).amax(1) == 0
            rescued = failed & (rewards_B.view(-1, G).amax(1) > 0)
            gate_B = rewards_B >= TAU
            kl = token_mean_kl(student_logits_BTV, teacher_logits_BTV, mask_BT)[gate_B].mean()
            print(f"{step:4}  {own_B.mean():12.0%}  {failed.sum():6}  {rescued.sum():7}  {gate_B.float().mean():9.0%}  {kl:10.3f}")
    print(f"sums right after: student {accuracy(student):.0%}")


if __name__ == "__main__":
    import sys
    TSTEPS,SSTEPS,LR,STEPS=int(sys.argv[1]),int(sys.argv[2]),float(sys.argv[3]),int(sys.argv[4])
    main(int(sys.argv[5]))
