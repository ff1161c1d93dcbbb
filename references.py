"""Several references at once: the KL is taken against their weighted geometric mixture, and may differ from record to record.

    pi_ref(token) = softmax( sum_i w_i log pi_i(token) )               w sums to 1

With one reference this is that reference. It is the logarithmic opinion pool of statistics (Genest & Zidek 1986), a product of experts with exponents
(Hinton 2002): a token that one of them finds impossible is impossible. A record with a column `reference` is held to the reference of that name alone.

    python train.py --ref-model calm=out-sft/final:2 --ref-model bold=out/final:1

Left out on purpose: arithmetic mixtures, weights that are learned.
"""

import argparse
import re

import torch
from torch import nn

from engine import UserError, number
from hybrid import LOGIT_CHUNK, HybridModel, forward_rows


class ReferenceMixture(nn.Module):
    """Frozen models of one vocabulary by name. Called like a HybridModel, it gives a tuple of (B, T) log-probabilities: mixture, then each."""

    def __init__(self, models: dict[str, HybridModel], weights: dict[str, float]):
        super().__init__()
        self.names = list(models)
        self.models = nn.ModuleList(models.values())
        self.weights = [weights[name] / sum(weights.values()) for name in self.names]
        self.max_positions = min(model.max_positions for model in self.models)

    def check_names(self, examples: list) -> None:
        """Raises UserError for a column `reference` that names none of the models."""
        for name in (example.columns.get("reference") for example in examples):
            if name is not None and name not in self.names:
                raise UserError(
                    f"a record names the reference {name!r}; --ref-model knows {', '.join(self.names)}"
                )

    @torch.no_grad()
    def forward(
        self, input_ids, attention_mask, response_mask, temperature: float = 1.0
    ) -> tuple[torch.Tensor, ...]:
        """The inputs of HybridModel.forward, (B, T) each -> 1 + K tensors (B, T): under the mixture, then under each model."""
        before = [
            model.states_before(input_ids, attention_mask, response_mask) for model in self.models
        ]  # (N, H_i) each
        targets = input_ids[response_mask]  # (N,)
        columns = []
        for chunk in torch.arange(len(targets), device=targets.device).split(LOGIT_CHUNK):  # (n,)
            logps = [
                torch.log_softmax(m.logits(h[chunk], temperature), dim=-1)
                for m, h in zip(self.models, before)
            ]  # (n, V) each
            mixture = torch.log_softmax(
                sum(w * logp for w, logp in zip(self.weights, logps)), dim=-1
            )  # (n, V)
            columns.append(
                torch.stack(
                    [logp.gather(1, targets[chunk, None]).squeeze(1) for logp in (mixture, *logps)]
                )
            )  # (1 + K, n)
        scores = torch.cat(columns, dim=1)  # (1 + K, N)
        return tuple(
            torch.zeros_like(response_mask, dtype=torch.float32).masked_scatter(response_mask, row)
            for row in scores
        )


def reference_logprobs(
    reference: HybridModel | ReferenceMixture,
    batch,
    examples: list,
    micro_batch_size: int | None,
    temperature: float = 1.0,
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """What each row is held to, (B, T), and under each named reference, {name: (B, T)}. Raises UserError for a name that is not there."""
    if isinstance(reference, HybridModel):
        return forward_rows(reference, batch, micro_batch_size, temperature).logprobs, {}
    reference.check_names(examples)
    mixture, *each = forward_rows(reference, batch, micro_batch_size, temperature)
    named = dict(zip(reference.names, each))
    for i, example in enumerate(examples):
        name = example.columns.get("reference")
        if name is not None:
            mixture[i] = named[name][i]
    return mixture, named


def parse_reference(text: str) -> tuple[str, str, float]:
    """`name=path:weight`, `name=path`, or a path alone -> name, path, weight. Raises UserError for a weight that is none."""
    named = re.fullmatch(r"(\w+)=(.+?)(?::([0-9.eE+-]+))?", text)
    if named is None:
        return "reference", text, 1.0
    try:
        return named[1], named[2], number(float, 0, above=True)(named[3] or "1")
    except argparse.ArgumentTypeError as problem:
        raise UserError(f"--ref-model {text}: {problem}") from None


def add_flags(parser) -> None:
    group = parser.add_argument_group("reference")
    group.add_argument("--ref-model", action="append", metavar="REF", help="x")
    group.add_argument("--ref-refresh", type=number(int, 0), default=0, help="x")
    group.add_argument("--ref-ema", type=number(float, 0, 1), default=0.0, help="x")


def check_flags(args):
    if (args.ref_ema or args.ref_refresh) and len(args.ref_model or []) > 1:
        raise UserError("--ref-ema and --ref-refresh move one reference, not a mixture of several")


def load_references(args, model, tokenizer):
    from engine import AMP_DTYPES, compile_lm

    if not args.ref_model or args.ppo_ratio == 0:
        return None
    references, weights = {}, {}
    for name, path, weight in map(parse_reference, args.ref_model):
        loaded, ref_tokenizer = HybridModel.load(path, "--ref-model")
        if ref_tokenizer.get_vocab() != tokenizer.get_vocab():
            raise UserError(
                f"--ref-model {path} has another vocabulary than --model {args.model}, so their KL is undefined"
            )
        if args.max_length > loaded.max_positions:
            raise UserError(
                f"--ref-model {path} has a context of {loaded.max_positions} tokens; --max-length is {args.max_length}"
            )
        if name in references:
            raise UserError(
                f"--ref-model {name}: expected a name of its own for each, NAME=PATH:WEIGHT"
            )
        loaded.amp_dtype = AMP_DTYPES[
            args.amp
        ]  # the same arithmetic on both sides, or the KL is not 0 where they are equal
        references[name], weights[name] = (
            loaded.frozen_copy().to(model.value_head.weight.device),
            weight,
        )
        if args.compile:
            compile_lm(references[name])
    reference = references[name] if len(references) == 1 else ReferenceMixture(references, weights)
    if args.ref_ema and {n: p.shape for n, p in reference.named_parameters()} != {
        n: p.shape for n, p in model.named_parameters()
    }:
        raise UserError(
            f"--ref-ema averages weights, but --ref-model {path} and --model {args.model} differ in theirs"
        )
    return reference


def renew_reference(run, args):
    if run.reference is None or (
        args.ref_refresh and run.rl_steps and run.rl_steps % args.ref_refresh == 0
    ):
        run.reference = run.model.frozen_copy()


def follow_policy(run, args):
    from hybrid import merge

    if args.ref_ema:
        merge(run.reference, run.model, 1 - args.ref_ema)
