"""The model that SFT and PPO share: a causal LM, a linear value head, one `forward` for all scores.

Everything is indexed by the token it is about. The hidden state at column t-1 has read the tokens
before t, so it gives both the distribution of token t (through `lm_head`) and the value of the
state just before token t (through `value_head`).

    column          0    1    2    3    4    5    6
    input_ids       q0   q1   q2   r0   r1  EOS  PAD
    response_mask   0    0    0    1    1    1    0
    logprobs        0    0    0    *    *    *    0        taken from hidden column 2, 3, 4

Left out on purpose: a separate critic (both heads share one LM, as in Ziegler et al. 1909.08593),
dropout (the PPO ratio would differ from 1 before the first update), half-precision weights.
Loading, checking and packing of the LM itself are in lm.py.

    python hybrid.py merge out-sft/final out/final --out merged        # the average of two models
"""

import copy
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache

import parallel
from engine import Parser, UserError, check_new_folder, first_line, number, one_line_errors
from lm import (
    TINY_LM,  # noqa: F401  (`from hybrid import ...` offers it, and build_tiny)
    accepts,
    build_tiny,  # noqa: F401
    can_pack,
    check_architecture,
    context_of,
    disable_dropout,
    find_cache,
    find_logit_transform,
    fuse_activations,
    load_lm,
    states_before,
)

LOGIT_CHUNK = 1024  # response tokens that pass through lm_head together: at most (LOGIT_CHUNK, V)
VALUE_HEAD = "value_head.safetensors"


class TokenScores(NamedTuple):
    """Each (B, T) float32, indexed by the token it is about, 0 where `response_mask` is 0."""

    logprobs: torch.Tensor  # log pi(token t | tokens < t), nats
    entropy: torch.Tensor  # entropy of that distribution, nats; carries no gradient
    values: torch.Tensor  # V(state just before token t)


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of x over the True positions of mask (any equal shapes); 0 if there are none. A scalar.

    >>> masked_mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False])).item()
    1.5
    """
    # `where` and not `x * mask`: NaN * 0 is NaN
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(min=1)


class HybridModel(nn.Module):
    """`lm` is any Hugging Face causal LM; `value_head` starts at zero.

    So the first advantages are sums of rewards, discounted by gamma * lam. Raises UserError for an
    architecture that the code cannot train (`check_architecture`), or that does something between
    hidden states and logits that `logits` cannot repeat (`find_logit_transform`).
    """

    def __init__(self, lm: nn.Module):
        super().__init__()
        disable_dropout(lm)
        fuse_activations(lm)
        self.lm = lm
        self._accepts = accepts(lm.base_model)
        self.max_positions = context_of(lm)
        check_architecture(lm)
        self._cache_name = find_cache(lm)  # None: the sampler reads whole rows again
        self.logit_scale, self.logit_cap = find_logit_transform(lm)
        self.can_pack = can_pack(lm)
        # bfloat16 or float16: the LM computes in it; weights, losses and scores stay float32.
        self.amp_dtype: torch.dtype | None = None
        head = lm.get_output_embeddings()
        self.value_head = nn.Linear(head.weight.shape[1], 1, device=head.weight.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        response_mask: torch.Tensor,
        temperature: float = 1.0,
        entropy: bool = True,
    ) -> TokenScores:
        """Score every response token. input_ids (B, T) long; both masks (B, T) bool -> TokenScores.

        `entropy=False` leaves the entropy 0 and saves three passes over (N, V). Only
        response positions reach `lm_head`, LOGIT_CHUNK at a time; a (B, T, V) tensor never exists.
        Raises ValueError when column 0 is a response token: nothing before it predicts it.
        """
        if response_mask[:, 0].any():
            needed = "a response needs at least one token before it"
            raise ValueError(f"response_mask is True in column 0, but {needed}")
        before = self.states_before(input_ids, attention_mask, response_mask)  # (N, H)
        targets = input_ids[response_mask]  # (N,)
        recompute = torch.is_grad_enabled() and len(targets) > LOGIT_CHUNK  # one chunk is small
        logprobs, entropies = [], []
        for hidden, ids in zip(before.split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK)):
            inputs = (hidden, ids, temperature, entropy)  # hidden (n, H), ids (n,)
            if recompute:
                scored = checkpoint(self._score, *inputs, use_reentrant=False)
            else:
                scored = self._score(*inputs)
            logprobs.append(scored[0])
            entropies.append(scored[1])
        values = self.value_head(before.float()).squeeze(-1)  # (N,)

        def spread(x: torch.Tensor) -> torch.Tensor:  # (N,) -> (B, T)
            zeros = torch.zeros_like(response_mask, dtype=torch.float32)
            return zeros.masked_scatter(response_mask, x.float())

        return TokenScores(
            spread(torch.cat(logprobs)), spread(torch.cat(entropies)), spread(values)
        )

    def states_before(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, response_mask: torch.Tensor
    ) -> torch.Tensor:
        """The hidden state just before each response token, (N, H), row by row. By definition

            hidden = self.hidden_states(input_ids[:, :-1])  # (B, T - 1, H)
            return hidden[response_mask[:, 1:]]  # column t - 1 predicts token t

        `lm.states_before` gives the same numbers and does less for padding: it packs short rows.
        """
        masks = (attention_mask, response_mask)
        return states_before(self.hidden_states, input_ids, *masks, packs=self.can_pack)

    def _score(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden (n, H), targets (n,) -> their log-probability; entropy or 0. Each (n,) float32."""
        logp = torch.log_softmax(self.logits(hidden, temperature), dim=-1)  # (n, V)
        entropies = torch.zeros(len(logp), device=logp.device)  # (n,)
        if entropy:
            with torch.no_grad():
                entropies = -(logp.exp() * logp).sum(-1)
        return logp.gather(1, targets[:, None]).squeeze(1), entropies

    def logits(self, hidden: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """`lm_head` and what the model does after it. hidden (..., H) -> (..., V) float32.

        V may exceed the number of tokens (Qwen, Pythia). The ids without a token are not masked: a
        mask would change the LM's own loss. SFT makes them rare, `chat.decode` skips them.
        """
        with self.autocast():
            logits = self.lm.get_output_embeddings()(hidden)  # (..., V)
        logits = logits.float()
        if self.logit_scale != 1.0:
            logits = logits * self.logit_scale
        if self.logit_cap is not None:
            logits = self.logit_cap * torch.tanh(logits / self.logit_cap)
        return logits if temperature == 1.0 else logits / temperature

    def hidden_states(
        self, input_ids, attention_mask=None, position_ids=None, cache=None
    ) -> torch.Tensor:
        """The LM without its head: (B, T) ids -> (B, T, H), what `lm_head` reads.

        A `cache` is filled in place. Position ids that begin again at 0 within a row, without an
        attention mask, mean several texts in one row.
        """
        inputs = dict(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids)
        inputs |= {"use_cache": cache is not None, self._cache_name: cache}
        known = {k: v for k, v in inputs.items() if k in self._accepts and v is not None}
        with self.autocast():
            return self.lm.base_model(**known).last_hidden_state

    def autocast(self):
        """The precision that `amp_dtype` asks for, as a context."""
        device, dtype = self.value_head.weight.device.type, self.amp_dtype
        return torch.autocast(device, dtype, enabled=dtype is not None)

    def new_cache(self):
        """An empty key-value cache for `hidden_states`, or None where the model has none."""
        return DynamicCache(config=self.lm.config) if self._cache_name else None

    def frozen_copy(self) -> "HybridModel":
        """A copy that never changes: the reference of the KL penalty."""
        return copy.deepcopy(self).requires_grad_(False).eval()

    def save(self, folder: str | Path, tokenizer) -> None:
        """A plain Hugging Face folder, and the value head as one more file in it."""
        folder = Path(folder)
        self.lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file(self.value_head.state_dict(), folder / VALUE_HEAD)
        for path in folder.glob("*.safetensors"):
            # Only the owner can read a file of safetensors; give it the mode of config.json.
            shutil.copymode(folder / "config.json", path)

    @classmethod
    def load(cls, name: str, what: str = "model", **options) -> tuple["HybridModel", object]:
        """Model and tokenizer from a folder or a hub id, in float32, with the value head if saved.

        Raises UserError for whatever is missing, not causal, damaged or out of reach; `what` is the
        flag that it names, `options` are what `cls` takes beside the LM.
        """
        lm, tokenizer = load_lm(name, what)
        model = cls(lm, **options)
        path = Path(name) / VALUE_HEAD
        if path.is_file():
            try:
                model.value_head.load_state_dict(load_file(path))
            except (SafetensorError, RuntimeError) as problem:
                raise UserError(f"{path} does not fit the model: {first_line(problem)}") from None
        return model, tokenizer


@torch.no_grad()
def forward_rows(
    model: HybridModel, batch, micro_batch_size: int | None, temperature: float = 1.0
) -> tuple[torch.Tensor, ...]:
    """`model.forward` over the whole batch without gradient. Each (B, T).

    Every process does its share, `micro_batch_size` rows at a time.
    -> TokenScores of a HybridModel; the plain tuple that a ReferenceMixture gives.
    """
    width, device = batch.input_ids.shape[1], batch.input_ids.device
    # (B,) Rows of similar length go together: less padding.
    by_length = batch.lengths().argsort(stable=True)
    my_rows = parallel.share(by_length)
    scores = []  # one (S, T) for each row, S kinds of score
    if len(my_rows) > 0:
        for rows in my_rows.split(micro_batch_size or len(batch)):
            micro_batch = batch.rows(rows)
            inputs = (micro_batch.input_ids, micro_batch.attention_mask, micro_batch.response_mask)
            stacked = torch.stack(model(*inputs, temperature))  # (S, b, t)
            padded = nn.functional.pad(stacked, (0, width - stacked.shape[2]))  # (S, b, T)
            scores += padded.unbind(1)
    if parallel.world() > 1:
        scores = parallel.gather([row.cpu() for row in scores])  # B of them
    stacked = torch.stack(scores, dim=1).to(device)  # (S, B, T), in the order of `by_length`
    in_order = torch.empty_like(stacked).index_copy_(1, by_length, stacked)
    return TokenScores(*in_order) if isinstance(model, HybridModel) else tuple(in_order)


@torch.no_grad()
def merge(a: HybridModel, b: HybridModel, weight: float) -> HybridModel:
    """(1 - weight) * a + weight * b, parameter by parameter; `a` is changed and returned.

    A tied weight is one parameter, averaged once, and stays tied. Buffers (integer ones among them)
    are a's. Raises UserError for models of different shapes.
    """
    a_parameters, b_parameters = dict(a.named_parameters()), dict(b.named_parameters())
    for name in sorted(a_parameters.keys() | b_parameters.keys()):
        a_shape, b_shape = _shape(a_parameters.get(name)), _shape(b_parameters.get(name))
        if a_shape != b_shape:
            shapes = f"{name} is {a_shape} in one, {b_shape} in the other"
            raise UserError(f"the two models do not fit together: {shapes}")
    for name, parameter in a_parameters.items():
        parameter.lerp_(b_parameters[name], weight)  # exact at 0 and 1, and where both are equal
    return a


def _shape(parameter: nn.Parameter | None) -> tuple | str:
    return "absent" if parameter is None else tuple(parameter.shape)


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser("Merge two checkpoints into one plain Hugging Face folder.")
    add = parser.add_argument
    add("command", choices=("merge",), help="merge: linear average of the weights")
    add("a", help="a checkpoint folder or hub id")
    add("b", help="another of the same architecture and vocabulary")
    weight_help = "share of the second model: 0 is the first, 1 the second"
    add("--weight", type=number(float, 0, 1), default=0.5, help=weight_help)
    add("--out", required=True, help="folder for the result; must not exist")
    args = parser.parse_args(argv)
    check_new_folder(args.out)
    (a, tokenizer), (b, b_tokenizer) = HybridModel.load(args.a), HybridModel.load(args.b)
    if tokenizer.get_vocab() != b_tokenizer.get_vocab():
        problem = "have different vocabularies, so their weights do not mean the same"
        raise UserError(f"{args.a} and {args.b} {problem}")
    # Weights of equal shape may still not fit: the number of heads, for example, may differ.
    a_config, b_config = a.lm.config.to_dict(), b.lm.config.to_dict()
    may_differ = {"_name_or_path", "transformers_version", "dtype"}
    for name in sorted((a_config.keys() | b_config.keys()) - may_differ):
        values = a_config.get(name), b_config.get(name)
        if values[0] != values[1]:
            both = f"{name} is {values[0]} in one, {values[1]} in the other"
            raise UserError(f"{args.a} and {args.b} do not fit together: {both}")
    merge(a, b, args.weight).save(args.out, tokenizer)
    print(f"{1 - args.weight:g} x {args.a} + {args.weight:g} x {args.b} is in {args.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
