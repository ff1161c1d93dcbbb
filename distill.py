"""On-policy distillation: the student writes, and learns how its teacher would go on.

    loss = mean over sampled tokens of KL(student || teacher)      given the same tokens before
    KL(student || teacher) = sum over the vocabulary of p_s (log p_s - log p_t)

GKD (Agarwal et al. 2306.13649) with the student's own texts alone and the reverse KL, which MiniLLM
(Gu et al. 2306.08543) argues for: it punishes what the teacher would hardly write. As in GKD, the
sampled tokens are held fixed: no gradient goes through the sampling. So this is no policy gradient,
there are no rewards and no advantages, and the sum over the vocabulary is exact. One difference:
the mean is over the tokens of the whole update, as everywhere here; GKD takes the mean of each
response first. Left out on purpose: forward KL and JSD, texts of the teacher (SFT learns from
those), several teachers, a teacher with another vocabulary.

    python train.py --teacher out/final --out out-distilled
"""

import torch
from torch.utils.checkpoint import checkpoint

from data import Batch, batch_of
from dialogue import sample_episodes
from engine import UserError
from flags import spelled
from hybrid import LOGIT_CHUNK, HybridModel
from ppo import update_epochs
from runs import Algorithm
from schedules import mixed_in


def reverse_kl(student_logps: torch.Tensor, teacher_logps: torch.Tensor) -> torch.Tensor:
    """KL(student || teacher) in nats: log-probabilities (n, V) each -> (n,).

    >>> student, teacher = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    >>> round(reverse_kl(student.log(), teacher.log()).item(), 4)
    0.5108
    """
    return (student_logps.exp() * (student_logps - teacher_logps)).sum(-1)


def distill_loss(
    model: HybridModel, teacher: HybridModel, batch: Batch, temperature: float = 1.0
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """-> the mean KL of the response tokens, a scalar, and detached scalar stats.

    Both distributions are those at `temperature`. As in HybridModel.forward, LOGIT_CHUNK response
    tokens pass through both heads together; a (B, T, V) tensor never exists. The gradient reaches
    the student alone.
    """
    inputs = batch.input_ids, batch.attention_mask, batch.response_mask
    hidden = model.states_before(*inputs)  # (N, H)
    with torch.no_grad():
        teacher_hidden = teacher.states_before(*inputs)  # (N, H') of the teacher's width
    targets = batch.input_ids[batch.response_mask]  # (N,)

    # The rows of a head may be padded (Qwen), of a large model further than of a small one.
    heads = [lm.get_output_embeddings().weight for lm in (model.lm, teacher.lm)]
    vocabulary = min(len(head) for head in heads)  # V

    def log_probs(of: HybridModel, states: torch.Tensor) -> torch.Tensor:  # -> (n, V)
        return torch.log_softmax(of.logits(states, temperature)[:, :vocabulary], dim=-1)

    def score(hidden, teacher_hidden, ids) -> torch.Tensor:  # (n, H), (n, H'), (n,) -> (3, n)
        logps = log_probs(model, hidden)
        with torch.no_grad():
            teacher_logps = log_probs(teacher, teacher_hidden)
            sampled = (logps - teacher_logps).gather(1, ids[:, None]).squeeze(1)  # (n,)
            entropy = -(logps.exp() * logps).sum(-1)  # (n,)
        return torch.stack([reverse_kl(logps, teacher_logps), sampled, entropy])

    recompute = torch.is_grad_enabled() and len(targets) > LOGIT_CHUNK  # one chunk is small
    scores = []  # (3, n) of each chunk
    for chunk in zip(*[rows.split(LOGIT_CHUNK) for rows in (hidden, teacher_hidden, targets)]):
        if recompute:
            scores.append(checkpoint(score, *chunk, use_reentrant=False))
        else:
            scores.append(score(*chunk))
    kl, sampled, entropy = torch.cat(scores, dim=1).mean(1)  # scalars
    stats = {"kl": kl.detach(), "kl_sampled": sampled.detach(), "entropy": entropy.detach()}
    return kl, stats


def distill_step(
    model: HybridModel,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    *,
    teacher: HybridModel,
    temperature: float = 1.0,
    ppo_epochs: int = 1,
    minibatches: int = 1,
    **options,
) -> dict[str, float]:
    """The updates on one batch of the student's own texts. -> metrics `distill/...`.

    `options` are those of `update_epochs`. With one update, `kl` and `entropy` are those before it;
    with several, they are means over the updates.
    """

    def loss_fn(micro_batch: Batch):
        return distill_loss(model, teacher, micro_batch, temperature)

    options |= dict(ppo_epochs=ppo_epochs, minibatches=minibatches)
    metrics = update_epochs(model, batch, optimizer, loss_fn, **options)
    return {f"distill/{name}": value for name, value in metrics.items()}


# ----------------------------------------------------------------------------------------- in a run


def train_on_teacher(run, args) -> dict[str, float]:
    """A step of the loop in train.py: the student writes, and learns what the teacher thinks."""
    run.drawn = run.prompt_stream.next()
    episodes = sample_episodes(
        run.model,
        run.tokenizer,
        run.drawn,
        turns=args.turns,
        user=run.user,
        generator=run.generator_of_step(args.seed),
        **run.sampling,
    )
    batch = batch_of(run.tokenizer, [e.ids for e in episodes], [e.response_mask for e in episodes])
    truncated = sum([episode.truncated for episode in episodes], [])  # of each response
    metrics = {
        "distill/response_length": float(batch.response_mask.sum()) / len(batch),
        "distill/eos_rate": 1 - sum(truncated) / len(truncated),
    }
    options = {flag: getattr(args, flag) for flag in run.algorithm.step_flags}
    options |= dict(**run.update, temperature=args.temperature, generator=run.order_generator)
    options |= mixed_in(run)  # --schedule mix
    batch = batch.to(run.device)
    step = run.algorithm.step
    return metrics | step(run.model, batch, run.optimizer, teacher=run.reference, **options)


def check_flags(args) -> None:
    """Raises UserError for a missing teacher, and for flags that do not go with one."""
    if args.teacher is None:
        raise UserError("--algorithm distill learns from a model: give it one, --teacher MODEL")
    for flag in ("ref_model", "ref_ema", "ref_refresh"):
        if getattr(args, flag):
            raise UserError(
                f"{spelled(flag)} is for a reference, and here --teacher is it; leave it out"
            )
    if args.ppo_ratio == 0:
        raise UserError(
            "--teacher does nothing with --ppo-ratio 0, pure SFT; leave out one of them"
        )
    if args.hints is not None:
        raise UserError("--hints follows the scores of a reward, and --teacher gives none")
    if args.schedule in ("gate", "buffer"):
        raise UserError(
            f"--schedule {args.schedule} follows the scores of a reward, and --teacher gives none; "
            "take --schedule ratio or mix"
        )


ALGORITHM = Algorithm(
    train_on_teacher,
    distill_step,
    step_flags=("ppo_epochs", "minibatches"),
    flags=("teacher",),
    defaults={"ppo_epochs": 1, "minibatches": 1},  # every text is of the student as it is now
    from_teacher=True,
    check_flags=check_flags,
)
