"""Random scenarios of Algorithm 1 on several processes, for two_processes_ordinary.py. Any disagreement raises."""

import random
from collections import Counter
from pathlib import Path

from accelerate.utils import gather_object
from algorithm_1 import check_attempts, check_buffer, check_prompts, draw_scenario, drawn, expected, play
from kepo_harness import make_trainer, right


def main(output_dir: Path, world_size: int, scenarios: int) -> None:
    trainer = make_trainer(output_dir, lambda *a: right(a[1]), per_device_train_batch_size=4, log_rollouts=False)
    accelerator = trainer.accelerator
    assert accelerator.num_processes == world_size
    rng, seen = random.Random(4), Counter()
    for _ in range(scenarios):
        scenario = draw_scenario(rng, rng.choice([1, 2, 3, 3]))  # one and three groups of four straddle the processes
        want = expected(scenario)
        batch = play(trainer, scenario)
        calls = gather_object([(len(trainer.teacher.asked), len(trainer.calls))])
        assert set(calls) == {(bool(want.hinted), 1 + len(want.rounds))}  # all processes call, or none
        rounds = gather_object([list(drawn(trainer))])
        together = [sorted(draw for part in parts for draw in part) for parts in zip(*rounds, strict=True)]
        assert together == [sorted(each) for each in want.rounds]
        check_prompts(trainer)
        check_attempts(trainer, scenario)
        check_buffer(trainer, scenario, batch, want)
        explorers = [process for process, mine in enumerate(rounds) if any(mine)]
        seen.update({f"{len(explorers)} explored": 1, "unparsable": want.counts["unparsable"] > 0})
        attempts = gather_object([sum(bool(attempt) for _, attempt in trainer.teacher.about)])
        assert sum(attempts) == (len(want.hinted) if scenario.source == "failure" else 0)
    assert min(seen[f"{n} explored"] for n in range(world_size + 1)) >= 3 and seen["unparsable"] >= 3, seen
    if accelerator.is_main_process:
        (output_dir / "agreed").write_text(str(scenarios))
