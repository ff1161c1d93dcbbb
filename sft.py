"""Supervised fine-tuning: raise the log-probability of the target, token by token, of nothing else.

    loss = - mean over target tokens of log pi(token | everything before it)      (cross-entropy)

The prompt is read but not trained on, the EOS of a complete target is trained like any other token
(a model that never learns to stop is the most common SFT bug), the mean is over the whole update.
Left out on purpose: label smoothing, anything that needs a Trainer.

    python train.py --ppo-ratio 0        # SFT alone
"""

import torch

from data import Batch
from engine import Backend, accumulate, apply_gradients
from hybrid import HybridModel, forward_rows, masked_mean


def sft_loss(logprobs: torch.Tensor, response_mask: torch.Tensor) -> torch.Tensor:
    """Mean negative log-likelihood of the response tokens, in nats.

    logprobs (B, T): log pi(token t | tokens < t); response_mask (B, T) bool. Returns a scalar.

    >>> mask = torch.tensor([[False, True, True]])
    >>> round(sft_loss(torch.tensor([[-9.0, -1.0, -3.0]]), mask).item(), 4)
    2.0
    """
    return -masked_mean(logprobs, response_mask)


def sft_step(
    model: HybridModel,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    *,
    micro_batch_size: int | None = None,
    max_grad_norm: float = 1.0,
    backend: Backend | None = None,
) -> dict[str, float]:
    """One update on one batch. Returns `sft/` loss, entropy (nats a token), tokens, grad_norm.

    The value head is not part of the loss and comes out unchanged. `backend` is for float16 and
    several processes; None is plain torch.
    """

    def loss_fn(rows: Batch):
        scores = model(rows.input_ids, rows.attention_mask, rows.response_mask)
        loss = sft_loss(scores.logprobs, rows.response_mask)  # scalar
        entropy = masked_mean(scores.entropy, rows.response_mask)  # scalar
        return loss, {"loss": loss.detach(), "entropy": entropy}

    index = torch.arange(len(batch), device=batch.input_ids.device)  # (B,)
    backend = backend or Backend(model)
    stats = accumulate(backend, batch, index, micro_batch_size, loss_fn)
    stats["tokens"] = float(batch.response_mask.sum())
    stats |= apply_gradients(backend, optimizer, max_grad_norm)
    return {f"sft/{name}": value for name, value in stats.items()}


@torch.no_grad()
def held_out_nll(model: HybridModel, batch: Batch, micro_batch_size: int) -> float:
    """The SFT loss over the whole batch, without learning from it: nats per response token."""
    batch = batch.to(next(model.parameters()).device)
    logprobs = forward_rows(model, batch, micro_batch_size).logprobs  # (B, T)
    return float(sft_loss(logprobs, batch.response_mask))
