"""The model that SFT and PPO share: a Hugging Face causal LM, one linear value head, and one `forward` that scores tokens.

Everything is indexed by the token it is about. The hidden state at column t-1 has read the tokens before t, so it gives both
the distribution of token t (through `lm_head`) and the value of the state just before token t (through `value_head`).

    column          0    1    2    3    4    5    6
    input_ids       q0   q1   q2   r0   r1  EOS  PAD
    response_mask   0    0    0    1    1    1    0
    logprobs        0    0    0    *    *    *    0        taken from hidden column 2, 3, 4

Left out on purpose: a separate critic (the trunk is shared, as in Ziegler et al. 1909.08593), dropout (it would make the PPO ratio
differ from 1 before the first update), half-precision weights.

    python hybrid.py merge out-sft/final out-ppo/final --weight 0.5 --out merged      # the average of two checkpoints
"""

import copy
import inspect
import logging
import shutil
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.activations import NewGELUActivation

import parallel
from engine import Parser, UserError, check_new_folder, first_line, number, one_line_errors

LOGIT_CHUNK = 1024  # response tokens that pass through lm_head together: bounds the memory at (LOGIT_CHUNK, V)
VALUE_HEAD = "value_head.safetensors"
TINY_LM = dict(
    vocab_size=512,
    hidden_size=192,
    intermediate_size=512,
    num_hidden_layers=2,
    num_attention_heads=4,
    max_position_embeddings=256,
)


class TokenScores(NamedTuple):
    """Each (B, T) float32, indexed by the token it is about, 0 where `response_mask` is 0."""

    logprobs: torch.Tensor  # log pi(token t | tokens < t), nats
    entropy: torch.Tensor  # entropy of that distribution, nats; carries no gradient
    values: torch.Tensor  # V(state just before token t)


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean of x over the True positions of mask (any equal shapes); 0 when there are none. Returns a scalar.

    >>> masked_mean(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False])).item()
    1.5
    """
    return torch.where(mask, x, 0).sum() / mask.sum().clamp(
        min=1
    )  # where, not *: whatever lies off the mask, NaN too, is gone


class HybridModel(nn.Module):
    """`lm` is any Hugging Face causal LM; `value_head` starts at zero, so that the first advantages are discounted sums of rewards.

    Raises UserError for an architecture that breaks what is taken for granted here (`check_architecture`), or does something between hidden
    states and logits that `logits` cannot repeat (`find_logit_transform`).
    """

    def __init__(self, lm: nn.Module):
        super().__init__()
        disable_dropout(lm)
        fuse_activations(lm)
        self.lm = lm
        self._accepts = set(inspect.signature(lm.base_model.forward).parameters)
        self.max_positions = context_of(lm)
        # Its name differs between transformers releases. None for models without a cache and for recurrent ones (Mamba, ...), whose
        # decoding step cannot skip left padding: the sampler then reads whole rows again.
        names = [] if getattr(lm, "_is_stateful", False) else ["cache", "past_key_values"]
        self._cache_name = next((name for name in names if name in self._accepts), None)
        check_architecture(lm)
        self.logit_scale, self.logit_cap = find_logit_transform(lm)
        self.can_pack = can_pack(lm)
        self.amp_dtype: torch.dtype | None = (
            None  # bfloat16 or float16: the LM computes in it; weights, losses and scores stay float32
        )
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
        """Score every response token. input_ids (B, T) long; attention_mask, response_mask (B, T) bool -> TokenScores.

        `entropy=False` saves the work of that column, three passes over (N, V), and leaves it 0: for losses that do not ask.

        Only response positions reach `lm_head`, LOGIT_CHUNK at a time; a (B, T, V) tensor never exists.
        Raises ValueError when column 0 is a response token: nothing comes before it that could predict it.
        """
        if response_mask[:, 0].any():
            raise ValueError(
                "response_mask is True in column 0, but a response needs at least one token before it"
            )
        before = self.states_before(
            input_ids, attention_mask, response_mask
        )  # (N, H) the state just before each response token
        targets = input_ids[response_mask]  # (N,)
        recompute = (
            torch.is_grad_enabled() and len(targets) > LOGIT_CHUNK
        )  # one chunk alone is bounded already
        logprobs, entropies = [], []
        for hidden_chunk, target_chunk in zip(
            before.split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK)
        ):  # (n, H), (n,)
            if recompute:
                scored = checkpoint(
                    self._score,
                    hidden_chunk,
                    target_chunk,
                    temperature,
                    entropy,
                    use_reentrant=False,
                )
            else:
                scored = self._score(hidden_chunk, target_chunk, temperature, entropy)
            logprobs.append(scored[0])
            entropies.append(scored[1])
        values = self.value_head(before.float()).squeeze(-1)  # (N,)

        def place(x: torch.Tensor) -> torch.Tensor:  # (N,) -> (B, T)
            return torch.zeros_like(response_mask, dtype=torch.float32).masked_scatter(
                response_mask, x.float()
            )

        return TokenScores(place(torch.cat(logprobs)), place(torch.cat(entropies)), place(values))

    def states_before(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, response_mask: torch.Tensor
    ) -> torch.Tensor:
        """The hidden states that predict the response tokens: (N, H), row by row.

        Under causal attention no token sees the padding on its right, so the LM needs no mask. Where that padding is a tenth of the
        batch or more, short rows share a row of the LM ("packing"): nothing is computed for padding, and no text sees another.
        """
        input_ids, real = (
            input_ids[:, :-1],
            attention_mask[:, 1:],
        )  # (B, t) each, t = T - 1: nobody asks what follows a row's last token
        rows, width = input_ids.shape
        lengths = real.sum(1).tolist()  # B
        offset = (
            torch.arange(rows, device=input_ids.device) * width
        )  # (B,) where each row begins in the flattened LM input
        position_ids = None
        if self.can_pack and sum(lengths) < 0.9 * rows * width:
            bins, begins, bin_width = pack(lengths)
            offset = torch.tensor(
                [b * bin_width + begin for b, begin in zip(bins, begins)], device=input_ids.device
            )
            column = torch.arange(width, device=input_ids.device).expand(rows, -1)  # (B, t)
            to = (offset[:, None] + column)[real]  # (tokens,) place of each token
            packed = input_ids.new_zeros(
                2, (max(bins) + 1) * bin_width
            )  # ids and positions; a position of 0 begins a text
            packed[0, to], packed[1, to] = input_ids[real], column[real]
            input_ids, position_ids = packed.view(2, -1, bin_width)  # (bins, bin_width) each
        hidden = self.hidden_states(
            input_ids, position_ids=position_ids
        )  # (B, t, H), or (bins, bin_width, H)
        row, column = response_mask[:, 1:].nonzero(
            as_tuple=True
        )  # (N,) each: column t-1 predicts token t
        return hidden.flatten(0, 1).index_select(0, offset[row] + column)

    def _score(
        self, hidden: torch.Tensor, targets: torch.Tensor, temperature: float, entropy: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden (n, H), targets (n,) -> log-probability of the targets and entropy (or 0), each (n,) float32."""
        logp = torch.log_softmax(self.logits(hidden, temperature), dim=-1)  # (n, V)
        with torch.no_grad():
            spread = (
                -(logp.exp() * logp).sum(-1)
                if entropy
                else torch.zeros(len(logp), device=logp.device)
            )  # (n,)
        return logp.gather(1, targets[:, None]).squeeze(1), spread

    def logits(self, hidden: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
        """`lm_head` and what the architecture does after it, in float32. hidden (..., H) -> (..., V)."""
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
        """The LM without its head: (B, T) ids -> (B, T, H), what `lm_head` would read. A `cache` is filled in place.

        Position ids that begin again at 0 within a row, without an attention mask, mean several texts in one row.
        """
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "use_cache": cache is not None,
            self._cache_name: cache,
        }
        with self.autocast():
            return self.lm.base_model(
                **{k: v for k, v in inputs.items() if k in self._accepts and v is not None}
            ).last_hidden_state

    def autocast(self):
        """The precision that `amp_dtype` asks for, as a context."""
        return torch.autocast(
            self.value_head.weight.device.type, self.amp_dtype, enabled=self.amp_dtype is not None
        )

    def new_cache(self):
        """An empty key-value cache for `hidden_states`, or None where the sampler has to do without."""
        return DynamicCache(config=self.lm.config) if self._cache_name else None

    def frozen_copy(self) -> "HybridModel":
        """This model as it is now, never to change: the reference of the KL penalty."""
        return copy.deepcopy(self).requires_grad_(False).eval()

    def save(self, folder: str | Path, tokenizer) -> None:
        """A plain Hugging Face folder (AutoModelForCausalLM and AutoTokenizer read it) with the value head as a file beside."""
        self.lm.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        save_file(self.value_head.state_dict(), Path(folder) / VALUE_HEAD)
        for path in Path(folder).glob("*.safetensors"):
            shutil.copymode(
                Path(folder) / "config.json", path
            )  # safetensors lets nobody but the owner read what it writes

    @classmethod
    def load(cls, name: str, what: str = "model") -> tuple["HybridModel", PreTrainedTokenizerFast]:
        """Model and tokenizer from a folder or a hub id, in float32; with its value head if the folder has one.

        Raises UserError for whatever is missing, not causal, damaged or out of reach; `what` names the thing in it.
        """
        lm, tokenizer = load_lm(name, what)
        model = cls(lm)
        if (Path(name) / VALUE_HEAD).is_file():
            try:
                model.value_head.load_state_dict(load_file(Path(name) / VALUE_HEAD))
            except (SafetensorError, RuntimeError) as problem:
                raise UserError(
                    f"{Path(name) / VALUE_HEAD} does not fit the model: {first_line(problem)}"
                ) from None
        return model, tokenizer


@torch.no_grad()
def forward_rows(
    model: HybridModel, batch, micro_batch_size: int | None, temperature: float = 1.0
) -> tuple[torch.Tensor, ...]:
    """`model.forward` over the whole batch without gradient, each process its share, `micro_batch_size` rows at a time. Each (B, T).

    -> TokenScores of a HybridModel; the plain tuple that a ReferenceMixture gives.
    """
    width, device = batch.input_ids.shape[1], batch.input_ids.device
    by_length = batch.lengths().argsort(
        stable=True
    )  # (B,) like lengths go together: little padding
    mine = parallel.share(by_length)
    parts = []
    for rows in mine.split(micro_batch_size or len(batch)) if len(mine) else ():
        part = batch.rows(rows)
        scores = torch.stack(
            model(part.input_ids, part.attention_mask, part.response_mask, temperature)
        )  # (S, b, t) S kinds of score
        parts += torch.nn.functional.pad(scores, (0, width - scores.shape[2])).unbind(
            1
        )  # b x (S, T)
    if parallel.world() > 1:
        parts = parallel.gather([part.cpu() for part in parts])  # B x (S, T)
    scores = torch.stack(parts, dim=1).to(device)  # (S, B, T)
    columns = torch.empty_like(scores).index_copy_(1, by_length, scores)
    return TokenScores(*columns) if isinstance(model, HybridModel) else tuple(columns)


def context_of(lm: nn.Module) -> int:
    """Tokens that a Hugging Face model can look at together; practically endless where its config names no limit."""
    return getattr(lm.config.get_text_config(), "max_position_embeddings", None) or 10**9


def disable_dropout(lm: nn.Module) -> None:
    """Set every dropout, layer-drop and router-jitter rate to 0, for training too: modules, plain attributes and the config alike."""
    for holder in [lm.config, *lm.modules()]:
        for name, value in vars(holder).items():
            is_rate = (
                "drop" in name
                or "jitter" in name
                or (isinstance(holder, nn.modules.dropout._DropoutNd) and name == "p")
            )
            if isinstance(value, float) and is_rate:
                setattr(holder, name, 0.0)


def fuse_activations(lm: nn.Module) -> None:
    """transformers writes GPT-2's GELU as eight elementwise operations; torch has the same function as one."""
    for module in lm.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


def pack(lengths: list[int]) -> tuple[list[int], list[int], int]:
    """Put texts of these lengths side by side into few bins of one width, longest first, each into the first bin with room.

    -> bin and first column of each text, and the width: of the longest text, or a quarter or a half more where that leaves less empty.

    >>> pack([2, 5, 3])
    ([1, 0, 1], [3, 0, 0], 5)
    """

    def first_fit(width: int) -> tuple[list[int], list[int], int]:
        bins, begins, used = [0] * len(lengths), [0] * len(lengths), []
        for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
            bins[i] = next(
                (b for b, filled in enumerate(used) if filled + lengths[i] <= width), len(used)
            )
            if bins[i] == len(used):
                used.append(0)
            begins[i] = used[bins[i]]
            used[bins[i]] += lengths[i]
        return bins, begins, max(used)

    longest = max(lengths)
    return min(
        (first_fit(longest * quarters // 4) for quarters in (4, 5, 6)),
        key=lambda found: (max(found[0]) + 1) * found[2],
    )


@torch.no_grad()
def can_pack(lm: nn.Module) -> bool:
    """Do two texts in one row, told apart by position ids alone, score as they do alone? Tried on eight tokens.

    True of attention with position ids; recurrent models and ALiBi's distances cannot tell the texts apart.
    """
    if "position_ids" not in inspect.signature(lm.base_model.forward).parameters:
        return False
    ids = (
        torch.arange(8, device=lm.get_output_embeddings().weight.device)[None]
        % lm.config.get_text_config().vocab_size
    )  # (1, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]], device=ids.device)
    packed = lm.base_model(
        input_ids=ids, position_ids=positions, use_cache=False
    ).last_hidden_state  # (1, 8, H)
    alone = [
        lm.base_model(input_ids=part, use_cache=False).last_hidden_state
        for part in (ids[:, :3], ids[:, 3:])
    ]
    alone = torch.cat(alone, dim=1)  # (1, 8, H)
    return bool((packed - alone).abs().max() <= 1e-4 * alone.abs().max())


@torch.no_grad()
def check_architecture(lm: nn.Module) -> None:
    """Three things that everything here takes for granted, tried on eight tokens. Raises UserError for a model that lacks one.

    A later token must not change an earlier one's scores; training mode must score like evaluation mode; and a row must score the
    same with padding on its left, since that is how prompts of unequal length are sampled.
    """
    name, head = type(lm).__name__, lm.get_output_embeddings()
    if (
        head is None
        or lm.base_model is lm
        or "input_ids" not in inspect.signature(lm.base_model.forward).parameters
    ):
        raise UserError(
            f"{name} is not built as a decoder with an lm_head on top, so it cannot be trained here"
        )
    was_training = lm.training
    ids = (
        torch.arange(8, device=head.weight.device)[None] % lm.config.get_text_config().vocab_size
    )  # (1, 8)
    ones = torch.ones_like(ids)

    def logits(
        ids: torch.Tensor, mask: torch.Tensor, train: bool = False
    ) -> torch.Tensor:  # (1, t, V)
        inputs = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": (mask.cumsum(1) - 1).clamp(min=0),
        }
        accepted = inspect.signature(lm.forward).parameters
        return lm.train(train)(
            **{key: value for key, value in inputs.items() if key in accepted}
        ).logits.float()

    plain = logits(ids, ones)
    size = float(plain.abs().max())
    changed, padded = ids.clone(), torch.cat([ids[:, :3], ids], dim=1)
    changed[0, -1] = ids[0, 0]
    left = torch.cat([torch.zeros_like(ids[:, :3]), ones], dim=1)
    claims = {
        "is not causal: a later token changes the scores of an earlier one": logits(changed, ones)[
            :, :-1
        ]
        - plain[:, :-1],
        "scores differently in training mode, so the PPO ratio could not start at 1": logits(
            ids, ones, train=True
        )
        - plain,
        "does not ignore padding on the left, so prompts of unequal length cannot be sampled": logits(
            padded, left
        )[:, 3:]
        - plain,
    }
    lm.train(was_training)
    for problem, difference in claims.items():
        if not float(difference.abs().max()) <= 1e-4 * size + 1e-4:
            raise UserError(f"{name} {problem}; it cannot be trained here")


@torch.no_grad()
def find_logit_transform(lm: nn.Module) -> tuple[float, float | None]:
    """(scale, cap) such that the LM's own logits == cap * tanh(scale * lm_head(hidden) / cap), or scale * lm_head(hidden).

    Gemma caps its logits, Cohere and Granite scale them. The cap is read from the config, the scale is measured on eight
    tokens against the LM's own forward, and so is the whole claim. Raises UserError if it does not hold.
    """
    head, config = lm.get_output_embeddings(), lm.config.get_text_config()
    was_training = lm.training
    lm.eval()
    ids = torch.arange(8, device=head.weight.device)[None] % config.vocab_size  # (1, 8)
    mask = torch.ones_like(ids)
    theirs = lm(input_ids=ids, attention_mask=mask).logits.double()  # (1, 8, V)
    ours = head(
        lm.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
    ).double()  # (1, 8, V)
    lm.train(was_training)
    caps = [
        getattr(config, name, None)
        for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    ]
    cap = next((float(c) for c in caps if c), None)
    linear = (
        theirs if cap is None else cap * torch.atanh(theirs / cap)
    )  # undo the cap, then the rest is one factor
    scale = float((linear * ours).sum() / (ours * ours).sum().clamp(min=1e-30))  # least squares
    scale = float(f"{scale:.5g}") if scale else 1.0  # 1.0000003 -> 1
    again = scale * ours if cap is None else cap * torch.tanh(scale * ours / cap)
    if not torch.allclose(again, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max())):
        raise UserError(
            f"{type(lm).__name__} changes its logits after lm_head in a way that is neither a factor nor a soft cap; "
            "teach it to find_logit_transform and HybridModel.logits in hybrid.py"
        )
    return scale, cap


def load_lm(name: str, what: str = "model") -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """Causal LM (float32) and tokenizer from a local folder or a hub id. Raises UserError with what to do."""
    folder = Path(name)
    looks_local = folder.exists() or name.startswith((".", "/", "~"))
    if (folder / "final" / "config.json").is_file():
        raise UserError(f"{what} {name} is a run folder; its model is in {folder / 'final'}")
    if looks_local and not (folder / "config.json").is_file():
        raise UserError(
            f"{what} {name}: expected a Hugging Face model folder with a config.json, found none there"
        )
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # its retries are no news; the outcome is
    try:
        lm, report = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as problem:
        if looks_local:
            raise UserError(
                f"{what} {name} cannot be read as a causal LM: {first_line(problem)}"
            ) from None
        raise UserError(
            f"{what} {name} is no local folder and could not be fetched from the Hugging Face hub ({first_line(problem)}); "
            "check the name and the network, or give a downloaded folder"
            + ", or use the built-in --model tiny"
            * (what == "--model")
        ) from None
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise UserError(
            f"{what} {name} lacks {len(report['missing_keys'])} of its weights ({some} ...); is it a causal LM, and complete?"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError, AttributeError) as problem:
        raise UserError(
            f"{what} {name} has no tokenizer that can be read ({first_line(problem)}); save one beside the weights with tokenizer.save_pretrained"
        ) from None
    check_tokenizer(f"{what} {name}", lm, tokenizer)
    return lm, tokenizer


def check_tokenizer(name: str, lm: nn.Module, tokenizer) -> None:
    """Raises UserError unless there is a vocabulary, every id that it can produce has an embedding, and there is an EOS token."""
    if len(tokenizer) <= len(
        tokenizer.all_special_ids
    ):  # transformers makes an empty one where a folder holds none
        raise UserError(
            f"{name} has no tokenizer; save one beside the weights with tokenizer.save_pretrained"
        )
    rows = lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise UserError(
            f"{name}: the tokenizer has {len(tokenizer)} tokens but the model embeds only {rows}; they do not belong together"
        )
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{name}: the tokenizer has no EOS token, so a response could never end; set eos_token in tokenizer_config.json"
        )


def build_tiny(texts: list[str], seed: int = 0) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """A Llama of about 1 M random parameters and a byte-level BPE of at most 512 tokens trained on `texts`, in seconds.

    Any text can be encoded (all bytes are tokens); EOS is `<|endoftext|>`; there is no pad token, as in GPT-2.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_LM["vocab_size"],
        special_tokens=["<|endoftext|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    config = LlamaConfig(
        **{**TINY_LM, "vocab_size": len(tokenizer)},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random state is not ours to move
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return lm, tokenizer


@torch.no_grad()
def merge(a: HybridModel, b: HybridModel, weight: float) -> HybridModel:
    """(1 - weight) * a + weight * b, parameter by parameter; `a` is changed and returned. Raises UserError for unlike models.

    A tied weight is one parameter, averaged once, and stays tied. Buffers (integer ones among them) are a's.
    """
    ours, theirs = dict(a.named_parameters()), dict(b.named_parameters())
    shapes = [{name: tuple(p.shape) for name, p in side.items()} for side in (ours, theirs)]
    if shapes[0] != shapes[1]:
        odd = next(
            name
            for name in sorted(shapes[0].keys() | shapes[1].keys())
            if shapes[0].get(name) != shapes[1].get(name)
        )
        raise UserError(
            f"the two models do not fit together: {odd} is {shapes[0].get(odd, 'absent')} in one, {shapes[1].get(odd, 'absent')} in the other"
        )
    for name, parameter in ours.items():
        parameter.lerp_(theirs[name], weight)  # exact at 0 and 1, and where both are equal
    return a


@one_line_errors
def main(argv: list[str] | None = None) -> None:
    parser = Parser("Merge two checkpoints into one plain Hugging Face folder.")
    parser.add_argument("command", choices=("merge",), help="merge: linear average of the weights")
    parser.add_argument("a", help="a checkpoint folder or hub id")
    parser.add_argument("b", help="another of the same architecture and vocabulary")
    parser.add_argument(
        "--weight",
        type=number(float, 0, 1),
        default=0.5,
        help="share of the second model: 0 is the first, 1 the second",
    )
    parser.add_argument("--out", required=True, help="folder for the result; must not exist")
    args = parser.parse_args(argv)
    check_new_folder(args.out)
    (a, tokenizer), (b, other) = HybridModel.load(args.a), HybridModel.load(args.b)
    if tokenizer.get_vocab() != other.get_vocab():
        raise UserError(
            f"{args.a} and {args.b} have different vocabularies, so their weights do not mean the same"
        )
    ours, theirs = a.lm.config.to_dict(), b.lm.config.to_dict()
    for name in sorted(
        (ours.keys() | theirs.keys()) - {"_name_or_path", "transformers_version", "dtype"}
    ):
        if ours.get(name) != theirs.get(
            name
        ):  # weights of one shape mean other things under another number of heads
            raise UserError(
                f"{args.a} and {args.b} do not fit together: {name} is {ours.get(name)} in one, {theirs.get(name)} in the other"
            )
    merge(a, b, args.weight).save(args.out, tokenizer)
    print(f"{1 - args.weight:g} x {args.a} + {args.weight:g} x {args.b} is in {args.out}")


if __name__ == "__main__":
    main(sys.argv[1:])
