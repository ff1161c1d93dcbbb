"""Supervised fine-tuning: raise the log-probability of every target token, and of nothing else.

    loss = - mean over target tokens of log pi(token | everything before it)      (cross-entropy)

The prompt is read but not trained on. The EOS of a complete target is trained like any other token
(else the model never learns to stop, a common bug of SFT). The mean is over the whole update.
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
    """One update on one batch. -> `sft/` loss, entropy, tokens, and what `apply_gradients` returns.

    Loss and entropy: nats a token. The value head does not change. `backend` None is plain torch.
    """

    def loss_fn(micro_batch: Batch):
        mask = micro_batch.response_mask
        scores = model(micro_batch.input_ids, micro_batch.attention_mask, mask)
        loss = sft_loss(scores.logprobs, mask)  # scalar
        entropy = masked_mean(scores.entropy, mask)  # scalar
        return loss, {"loss": loss.detach(), "entropy": entropy}

    backend = backend or Backend(model)
    rows = torch.arange(len(batch), device=batch.input_ids.device)  # (B,)
    stats = accumulate(backend, batch, rows, micro_batch_size, loss_fn)
    stats["tokens"] = float(batch.response_mask.sum())
    stats |= apply_gradients(backend, optimizer, max_grad_norm)
    return {f"sft/{name}": value for name, value in stats.items()}


@torch.no_grad()
def held_out_nll(model: HybridModel, batch: Batch, micro_batch_size: int) -> float:
    """The SFT loss of a whole batch, without gradient: nats per response token."""
    batch = batch.to(next(model.parameters()).device)
    logprobs = forward_rows(model, batch, micro_batch_size).logprobs  # (B, T)
    return float(sft_loss(logprobs, batch.response_mask))
