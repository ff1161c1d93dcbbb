"""DPO: learn from preferences, without sampling and without a reward model.

Rafailov et al. 2305.18290, eq. 7, with log pi and log ref summed over a response:

    loss = -log sigmoid(beta * [(log pi - log ref)(chosen) - (log pi - log ref)(rejected)])

An example of a new algorithm in one file. The layout is the one of data.py: a pair is two rows of a
Batch, and `forward(...).logprobs.sum(1)` is the log-probability of a response. Left out on purpose:
the other losses of the family (IPO, SimPO, ...); they differ from `dpo_loss` in a line or two.

    python train.py --algorithm dpo --out out-dpo
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from chat import cut_prompt, encode_demonstration, end_ids, room_for_prompt
from data import Batch, Pair, load_pairs, make_batch, pair_options
from engine import Backend, UserError, accumulate, apply_gradients
from hybrid import HybridModel, forward_rows
from references import ReferenceMixture, reference_logprobs
from runs import Algorithm


@dataclass
class PairBatch(Batch):
    """n pairs as 2n rows: all chosen responses, then all rejected ones; an index is a pair."""

    ref_logprobs: torch.Tensor  # (2n, T) under the reference

    def __len__(self) -> int:
        return len(self.input_ids) // 2

    def rows(self, index: torch.Tensor) -> "PairBatch":
        return super().rows(torch.cat([index, index + len(self)]))

    def weight(self, index: torch.Tensor) -> torch.Tensor:
        """DPO's mean is over pairs, not over tokens."""
        return torch.tensor(float(len(index)), device=self.input_ids.device)

    def lengths(self) -> torch.Tensor:
        return torch.maximum(*self.attention_mask.sum(1).chunk(2))  # (n,)


def preference_pairs(args) -> list[Pair]:
    """The pairs of --preference-data; none if they are to be made from the built-in task.

    Raises UserError where --data needs them and they are not given.
    """
    if args.preference_data is not None:
        return load_pairs(args.preference_data, what="--preference-data", **pair_options(args))
    if args.data not in (None, "reviews"):
        raise UserError(
            f"--algorithm {args.algorithm} learns from preferences: give --preference-data "
            "(prompt, chosen, rejected)"
        )
    return []


def preference_batch(
    tokenizer,
    reference: HybridModel | ReferenceMixture,
    pairs: list[Pair],
    max_length: int,
    micro_batch_size: int | None = None,
    max_prompt_length: int | None = None,
) -> PairBatch:
    """Token ids of both responses to each prompt, with their ends, and their log-probabilities
    under the reference. Rows as in PairBatch, cut as by `demonstration_batch`."""
    ends, prompts, responses = end_ids(tokenizer), [], ([], [])
    for pair in pairs:
        sides = [encode_demonstration(tokenizer, e, max_prompt_length, ends) for e in pair.sides()]
        prompt, longest = sides[0][0], max(len(answer) for _, answer in sides)
        if max_prompt_length is None:  # Eq. 7 compares two responses to one x: one cut for both
            room = room_for_prompt(max_length, longest)
            prompt = cut_prompt(tokenizer, pair.sides()[0], prompt, room)
        prompts.append(prompt)
        for answers, (_, answer) in zip(responses, sides):
            answers.append(answer[: max_length - len(prompt)])
    batch = make_batch(tokenizer, prompts * 2, [*responses[0], *responses[1]], max_length)
    batch = batch.to(next(reference.parameters()).device)
    ref_logprobs, _ = reference_logprobs(reference, batch, pairs * 2, micro_batch_size)  # (2n, T)
    return PairBatch(**vars(batch), ref_logprobs=ref_logprobs)


def dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of whole responses, in nats, (B,) each -> losses, chosen_rewards,
    rejected_rewards, (B,) each; rewards detached.

    `label_smoothing` is the assumed share of pairs in which chosen and rejected are swapped
    (conservative DPO, Mitchell 2023).

    >>> losses, *_ = dpo_loss(*torch.tensor([[-3.0], [-3.0], [-5.0], [-5.0]]))
    >>> round(losses.item(), 4)  # no change against the reference: log 2
    0.6931
    """
    # (B,) each: the implicit reward, eq. 5, without its term that depends on the prompt alone
    chosen_rewards = beta * (policy_chosen_logps - reference_chosen_logps)
    rejected_rewards = beta * (policy_rejected_logps - reference_rejected_logps)
    margin = chosen_rewards - rejected_rewards  # (B,)
    losses = -(1 - label_smoothing) * logsigmoid(margin)  # (B,) eq. 7
    losses = losses - label_smoothing * logsigmoid(-margin)  # (B,) 0 unless labels are smoothed
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def update_pairs(
    model: HybridModel,
    batch: PairBatch,
    optimizer: torch.optim.Optimizer,
    pair_loss,
    *,
    micro_batch_size: int | None = None,
    max_grad_norm: float = 1.0,
    backend: Backend | None = None,
) -> dict[str, float]:
    """One update on pairs, `micro_batch_size` of them at a time.

    `pair_loss` has the tensors of `dpo_loss` as arguments and results. -> loss, accuracy (share of
    pairs whose chosen response has the larger implicit reward), the means of both rewards and of
    their margin, and what `apply_gradients` returns.
    """

    def loss_fn(micro_batch: PairBatch):
        inputs = micro_batch.input_ids, micro_batch.attention_mask, micro_batch.response_mask
        scores = model(*inputs, entropy=False)
        policy = scores.logprobs.sum(1).chunk(2)  # chosen (b,), rejected (b,)
        reference = micro_batch.ref_logprobs.sum(1).chunk(2)  # chosen (b,), rejected (b,)
        losses, chosen, rejected = pair_loss(*policy, *reference)  # (b,) each
        loss = losses.mean()
        stats = {
            "loss": loss.detach(),
            "accuracy": (chosen > rejected).float().mean(),
            "chosen_reward": chosen.mean(),
            "rejected_reward": rejected.mean(),
            "margin": (chosen - rejected).mean(),
        }
        return loss, stats

    backend = backend or Backend(model)
    pairs = torch.arange(len(batch), device=batch.input_ids.device)  # (n,)
    stats = accumulate(backend, batch, pairs, micro_batch_size, loss_fn)
    return stats | apply_gradients(backend, optimizer, max_grad_norm)


def dpo_step(
    model: HybridModel,
    batch: PairBatch,
    optimizer: torch.optim.Optimizer,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    **options,
) -> dict[str, float]:
    """`update_pairs` with `dpo_loss`; `options` are its other arguments. -> metrics `dpo/...`."""

    def pair_loss(*logps: torch.Tensor):
        return dpo_loss(*logps, beta, label_smoothing)

    stats = update_pairs(model, batch, optimizer, pair_loss, **options)
    return {f"dpo/{name}": value for name, value in stats.items()}


def train_on_pairs(run, args) -> dict[str, float]:
    """A step of the loop in train.py: one update on the next preference pairs."""
    run.drawn = run.pair_stream.next()
    batch = preference_batch(
        run.tokenizer,
        run.reference,
        run.drawn,
        micro_batch_size=args.micro_batch_size,
        **run.limits,
    )
    options = {flag: getattr(args, flag) for flag in run.algorithm.step_flags}
    return run.algorithm.step(run.model, batch, run.optimizer, **run.update, **options)


@torch.no_grad()
def measure_pairs(run, args) -> dict[str, float]:
    """Held-out pairs: the share whose chosen response has the larger implicit reward, and the
    margin between the two rewards. Named `eval/...`; nothing without a reference or a pair."""
    if run.reference is None or not run.held_out_pairs:
        return {}
    margins = []  # one for each pair
    for begin in range(0, len(run.held_out_pairs), args.batch_size):
        pairs = run.held_out_pairs[begin : begin + args.batch_size]
        batch = preference_batch(
            run.tokenizer,
            run.reference,
            pairs,
            micro_batch_size=args.micro_batch_size,
            **run.limits,
        )
        rows = Batch(batch.input_ids, batch.attention_mask, batch.response_mask)  # 2n rows
        logprobs = forward_rows(run.model, rows, args.micro_batch_size).logprobs  # (2n, T)
        chosen, rejected = (logprobs - batch.ref_logprobs).sum(1).chunk(2)  # (n,) each
        margins += (args.beta * (chosen - rejected)).tolist()
    wins = [margin for margin in margins if margin > 0]
    return {
        "eval/preference_accuracy": len(wins) / len(margins),
        "eval/preference_margin": sum(margins) / len(margins),
    }


ALGORITHM = Algorithm(
    train_on_pairs,
    dpo_step,
    step_flags=("beta",),
    flags=("preference_data",),
    preference_pairs=preference_pairs,
    measure=measure_pairs,
)
