"""Several references at once: the KL is taken against their weighted geometric mixture.

    pi_ref(token) = softmax( sum_i w_i log pi_i(token) )               w sums to 1

With one reference this is that reference. It is the logarithmic opinion pool of statistics (Genest
& Zidek 1986), a product of experts with exponents (Hinton 2002): what one of them finds impossible
is impossible. A record with a field `reference` is compared with the model of that name alone.
Left out on purpose: arithmetic mixtures, weights that are learned.

    python train.py --ref-model calm=out-sft/final:2 --ref-model bold=out/final:1
"""

import argparse
import re

import torch
from torch import nn

from engine import AMP_DTYPES, UserError, compile_lm, number
from hybrid import LOGIT_CHUNK, HybridModel, forward_rows, merge


class ReferenceMixture(nn.Module):
    """Frozen models of one vocabulary, by name. Called like a HybridModel, it gives a tuple of
    log-probabilities, (B, T) each: under the mixture, then under each model."""

    def __init__(self, models: dict[str, HybridModel], weights: dict[str, float]):
        super().__init__()
        self.names = list(models)
        self.models = nn.ModuleList(models.values())
        self.weights = [weights[name] / sum(weights.values()) for name in self.names]
        self.max_positions = min(model.max_positions for model in self.models)

    def check_names(self, examples: list) -> None:
        """Raises UserError for a field `reference` that names none of the models."""
        for example in examples:
            name = example.columns.get("reference")
            if name is not None and name not in self.names:
                known = f"--ref-model names {', '.join(self.names)}"
                raise UserError(f"a record names the reference {name!r}; {known}")

    @torch.no_grad()
    def forward(
        self, input_ids, attention_mask, response_mask, temperature: float = 1.0
    ) -> tuple[torch.Tensor, ...]:
        """What HybridModel.forward takes, (B, T) each -> 1 + K tensors (B, T)."""
        inputs = (input_ids, attention_mask, response_mask)
        before = [model.states_before(*inputs) for model in self.models]  # (N, H_i) each
        targets = input_ids[response_mask]  # (N,)
        chunks = []
        for chunk in torch.arange(len(targets), device=targets.device).split(LOGIT_CHUNK):  # (n,)
            hidden = [states[chunk] for states in before]  # (n, H_i) each
            chunks.append(self._score(hidden, targets[chunk], temperature))  # (1 + K, n)
        zeros = torch.zeros_like(response_mask, dtype=torch.float32)  # (B, T)
        rows = torch.cat(chunks, dim=1)  # (1 + K, N)
        return tuple(zeros.masked_scatter(response_mask, row) for row in rows)

    def _score(self, hidden: list, targets: torch.Tensor, temperature: float) -> torch.Tensor:
        """hidden (n, H_i) for each model, targets (n,) -> log-probabilities (1 + K, n)."""
        logits = [model.logits(h, temperature) for model, h in zip(self.models, hidden)]
        logps = [torch.log_softmax(model_logits, dim=-1) for model_logits in logits]  # (n, V) each
        mixture = torch.log_softmax(sum(w * logp for w, logp in zip(self.weights, logps)), dim=-1)
        scores = [logp.gather(1, targets[:, None]).squeeze(1) for logp in (mixture, *logps)]
        return torch.stack(scores)


def reference_logprobs(
    reference: HybridModel | ReferenceMixture,
    batch,
    examples: list,
    micro_batch_size: int | None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities under the reference of each row, (B, T), and under each by {name: (B, T)}.

    Raises UserError for a record that names a model that the mixture does not have.
    """
    if isinstance(reference, HybridModel):
        return forward_rows(reference, batch, micro_batch_size, temperature).logprobs, {}
    reference.check_names(examples)
    logprobs, *by_model = forward_rows(reference, batch, micro_batch_size, temperature)
    by_name = dict(zip(reference.names, by_model))
    for i, example in enumerate(examples):
        name = example.columns.get("reference")
        if name is not None:
            logprobs[i] = by_name[name][i]
    return logprobs, by_name


# ----------------------------------------------------------------------------------------- in a run


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that would move several references."""
    if (args.ref_ema or args.ref_refresh) and len(args.ref_model or []) > 1:
        raise UserError("--ref-ema and --ref-refresh move one reference, not a mixture of several")


def parse_reference(text: str) -> tuple[str, str, float]:
    """`name=path:weight`, `name=path`, or a path alone -> name, path, weight.

    Raises UserError for a weight that is no number above 0.
    """
    match = re.fullmatch(r"(\w+)=(.+?)(?::([0-9.eE+-]+))?", text)
    if match is None:
        return "reference", text, 1.0
    try:
        return match[1], match[2], number(float, 0, above=True)(match[3] or "1")
    except argparse.ArgumentTypeError as problem:
        raise UserError(f"--ref-model {text}: {problem}") from None


def load_references(
    args: argparse.Namespace, model: HybridModel, tokenizer
) -> HybridModel | ReferenceMixture | None:
    """What --ref-model or --teacher names, frozen, on the model's device; None without one of them,
    and in pure SFT.

    Raises UserError for a model that cannot score what the policy writes.
    """
    if args.teacher is not None:
        return load_reference(args.teacher, "--teacher", args, model, tokenizer)
    if not args.ref_model or args.ppo_ratio == 0:
        return None
    references, weights = {}, {}
    for name, path, weight in map(parse_reference, args.ref_model):
        if name in references:
            why = "expected a name of its own for each, NAME=PATH:WEIGHT"
            raise UserError(f"--ref-model {name}: {why}")
        references[name] = load_reference(path, "--ref-model", args, model, tokenizer)
        weights[name] = weight
    if len(references) > 1:
        return ReferenceMixture(references, weights)
    pair = (model, references[name])
    shapes = [{name: p.shape for name, p in lm.named_parameters()} for lm in pair]
    if args.ref_ema and shapes[0] != shapes[1]:
        why = f"--ref-model {path} and --model {args.model} differ in theirs"
        raise UserError(f"--ref-ema averages weights, but {why}")
    return references[name]


def load_reference(path: str, flag: str, args, model: HybridModel, tokenizer) -> HybridModel:
    """The frozen model of a folder or hub id that `flag` names. Raises UserError where it cannot
    score what the policy writes."""
    reference, ref_tokenizer = HybridModel.load(path, flag)
    if ref_tokenizer.get_vocab() != tokenizer.get_vocab():
        why = f"has another vocabulary than --model {args.model}, so their KL is undefined"
        raise UserError(f"{flag} {path} {why}")
    if args.max_length > reference.max_positions:
        why = f"has a context of {reference.max_positions} tokens"
        raise UserError(f"{flag} {path} {why}; --max-length is {args.max_length}")
    # The policy's precision: else the KL of two equal models would not be 0.
    reference.amp_dtype = AMP_DTYPES[args.amp]
    reference = reference.frozen_copy().to(next(model.parameters()).device)
    if args.compile:
        compile_lm(reference)
    return reference


def renew_reference(run, args: argparse.Namespace) -> None:
    """Before an RL step: the policy becomes the reference where there is none, or it is time.

    The first time is when PPO first starts, so that the KL does not undo SFT.
    """
    is_due = args.ref_refresh and run.rl_steps and run.rl_steps % args.ref_refresh == 0
    if run.reference is None or is_due:
        run.reference = run.model.frozen_copy()


def follow_policy(run, args: argparse.Namespace) -> None:
    """After an RL step: the reference moves a little towards the policy (--ref-ema)."""
    if args.ref_ema:
        merge(run.reference, run.model, 1 - args.ref_ema)
