"""Started by test_parallel.py in two processes. Each writes what it saw to FOLDER/<rank>.pt."""

import sys
from pathlib import Path

import conftest  # noqa: F401  (puts the repository on the path)
import torch
from conftest import build_lm, ragged_batch, shaken

import dialogue
import parallel
import ppo
from data import Example, make_batch
from distill import distill_step
from engine import Backend, NonFiniteReward
from generate import sample
from hybrid import HybridModel
from lora import LoraModel
from rewards import build_reward
from sft import sft_step

EOS = 2


class Ids:
    """A tokenizer whose texts are ids: prompts and responses pass through as they are."""

    eos_token_id = pad_token_id = EOS


def new_model() -> HybridModel:
    model = HybridModel(build_lm("llama")).train()
    torch.manual_seed(3)
    torch.nn.init.normal_(model.value_head.weight)
    return model


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-5, weight_decay=0.0)


def with_adapter() -> LoraModel:
    """A model with a frozen base, and a B that is not 0: else A would get no gradient at first."""
    return shaken(LoraModel(build_lm("llama"), rank=3, alpha=7.0, seed=5)).train()


def sft_weights(make_backend=Backend, steps: int = 3, make_model=new_model) -> dict:
    model = make_model()
    optimizer, backend = adamw(model), make_backend(model)
    for seed in range(steps):  # seven rows: one process has four, the other three
        stats = sft_step(
            model,
            make_batch(None, *ragged_batch(seed, rows=7), max_length=32),
            optimizer,
            micro_batch_size=2,
            backend=backend,
        )
    return {
        "weights": {k: v.clone() for k, v in model.state_dict().items()},
        "stats": stats,
        "head_state": len(optimizer.state[model.value_head.weight]),
    }


def distill_weights(make_backend=Backend) -> dict:
    """Two updates of plain SGD without clipping, on seven rows of many lengths."""
    model, teacher = new_model(), HybridModel(build_lm("gpt2", seed=1)).frozen_copy()
    metrics = distill_step(
        model,
        make_batch(None, *ragged_batch(2, rows=7), max_length=32),
        torch.optim.SGD(model.parameters(), lr=1e-2),
        teacher=teacher,
        minibatches=2,
        micro_batch_size=2,
        max_grad_norm=1e9,
        backend=make_backend(model),
        generator=torch.Generator().manual_seed(5),
    )
    return {"weights": {k: v.clone() for k, v in model.state_dict().items()}, "metrics": metrics}


def ppo_weights(rollout, make_backend=Backend, minibatches: int = 2, make_model=new_model) -> dict:
    """Two epochs of plain SGD without clipping: the weights are the sum of the gradients."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    options = dict(
        ppo_epochs=2,
        minibatches=minibatches,
        micro_batch_size=2,
        max_grad_norm=1e9,
        generator=torch.Generator().manual_seed(5),
    )
    metrics = ppo.ppo_step(model, rollout, optimizer, backend=make_backend(model), **options)
    return {"weights": {k: v.clone() for k, v in model.state_dict().items()}, "metrics": metrics}


def collect(model, reward, rows: int = 7):
    dialogue.encode_prompt = lambda tokenizer, example: example.columns["ids"]
    dialogue.decode = lambda tokenizer, ids: " ".join(map(str, ids))
    examples = [Example("", "", {"ids": ids}) for ids in ragged_batch(1, rows=rows)[0]]
    generator = torch.Generator().manual_seed(100 + parallel.rank())
    return ppo.collect_rollout(
        model,
        model.frozen_copy(),
        Ids,
        examples,
        reward,
        kl_coef=0.1,
        max_length=40,
        max_new_tokens=12,
        micro_batch_size=2,
        generator=generator,
    )


REWARDS = """
import torch.distributed

def count(completions, **columns):
    return [float(len(set(c.split()))) for c in completions]

def fails(completions, **columns):
    return [float("nan") if torch.distributed.get_rank() else 1.0 for _ in completions]
"""


def main(folder: Path) -> None:
    parallel.start(torch.device("cpu"))
    rank = parallel.rank()
    report = {"sft": sft_weights(), "distill": distill_weights()}
    report |= {"lora": sft_weights(make_model=with_adapter)}
    report |= {"gathered": parallel.gather(parallel.share(list("abcdefg")))}

    if rank == 0:
        (folder / "reward.py").write_text(REWARDS)
    parallel.everybody(None)  # the file is there
    reward = build_reward(f"ema({folder}/reward.py:count)")
    rollout, metrics = collect(new_model(), reward)
    report |= {
        "rollout": rollout,
        "rollout_metrics": metrics,
        "reward_state": reward.state_dict(),
        "ppo": ppo_weights(rollout),
        "ppo_lora": ppo_weights(rollout, make_model=with_adapter),
    }
    scarce = ppo.Rollout(**vars(rollout))
    # Three rows in three minibatches: one process has none.
    scarce.response_mask = scarce.response_mask & (torch.arange(7) < 3)[:, None]
    report["scarce"] = ppo_weights(scarce, minibatches=3)

    try:
        collect(new_model(), build_reward(f"{folder}/reward.py:fails"))
        report["failure"] = None
    except NonFiniteReward as problem:
        report["failure"] = str(problem)

    # The first process's responses end at once, the second's never do.
    model, logits = new_model(), None
    logits = model.logits
    push = torch.zeros(61).index_fill(0, torch.tensor([EOS]), -100.0 if rank else 100.0)
    model.logits = lambda hidden, temperature=1.0: logits(hidden, temperature) + push
    report["uneven"] = [
        len(r) for r in sample(model, [[5, 6]] * 6, max_new_tokens=30, eos_token_id=EOS).responses
    ]
    report["ranks_alone"] = sample(
        new_model(),
        [[5, 6, 7]] * 2,
        max_new_tokens=12,
        eos_token_id=EOS,
        generator=torch.Generator().manual_seed(100 + rank),
    ).responses
    torch.save(report, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
