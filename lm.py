"""A Hugging Face causal LM made ready for `HybridModel`: loaded or built, checked, packed.

`check_architecture`, `find_logit_transform`, `find_cache` and `can_pack` try on eight tokens what
the rest of the code assumes; `states_before` does no work for padding. Nothing here is about SFT or
PPO, so a first reading may skip this file.
Left out on purpose: encoder-decoder models, quantised weights, a list of known architectures.

    python -m pytest -q tests/test_model.py        # eighteen architectures against their own logits
"""

import inspect
import logging
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    LlamaConfig,
    PreTrainedTokenizerFast,
)
from transformers.activations import NewGELUActivation

from adapters import ADAPTER_CONFIG, add_adapter_of, read_adapter
from cli import listed
from engine import UserError, first_line
from flags import read_json

TINY_LM = dict(vocab_size=512, max_position_embeddings=256, hidden_size=192)
TINY_LM |= dict(intermediate_size=512, num_hidden_layers=2, num_attention_heads=4)
UNREADABLE = (OSError, ValueError, KeyError, ImportError)  # raised by transformers
UNLOADABLE = (*UNREADABLE, TypeError, RuntimeError, SafetensorError)  # the same, for weights
# A weight of another shape would be an error that names none; `check_weights` names it.
WITH_REPORT = dict(dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True)
# Names of PEFT and AdapterHub, and masks, frequencies and positions that releases of transformers
# before the fifth saved and this one computes (gpt2 and Pythia on the hub have them).
ADAPTER = re.compile(r"lora_|adapter|^base_model\.")
COMPUTED = re.compile(r"(^|\.)(attn|attention)\.(masked_)?bias$|inv_freq$|position_ids$")
MERGE_ADAPTER = "merge it into its model (merge_and_unload of PEFT), then name the merged folder"
SAVE_TOKENIZER = "save one beside the weights with tokenizer.save_pretrained"
CAP_NAMES = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")


# --------------------------------------------------------------------------- where an LM comes from


def load_lm(
    name: str, what: str = "model", adapters: tuple[Path, ...] = ()
) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """Causal LM (float32) and tokenizer from a local folder or a hub id.

    `what` is the flag that errors name; `adapters` are the folders whose base is asked for. Raises
    UserError that says what to do.
    """
    folder = Path(name)
    is_local = folder.exists() or folder.is_absolute() or name.startswith((".", "/", "~"))
    if (folder / "final" / "config.json").is_file():
        raise UserError(f"{what} {name} is a run folder; its model is in {folder / 'final'}")
    if (folder / ADAPTER_CONFIG).is_file():
        return load_adapted(name, what, adapters)
    if is_local and not (folder / "config.json").is_file():
        expected = "expected a Hugging Face model folder with a config.json, found none there"
        raise UserError(f"{what} {name}: {expected}")
    # Only the result matters, not the hub's messages about its retries.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    load = AutoModelForCausalLM.from_pretrained
    try:
        lm, report = load(name, **WITH_REPORT)
    except UNLOADABLE as problem:
        reason = first_line(problem)
        if is_local:
            raise UserError(f"{what} {name} cannot be read as a causal LM: {reason}") from None
        advice = "check the name and the network, or give a downloaded folder"
        if what == "--model":
            advice += ", or use the built-in --model tiny"
        failure = "is no local folder and could not be fetched from the Hugging Face hub"
        raise UserError(f"{what} {name} {failure} ({reason}); {advice}") from None
    check_weights(f"{what} {name}", lm, report)
    tokenizer = load_tokenizer(name, what)
    check_tokenizer(f"{what} {name}", lm, tokenizer)
    return lm, tokenizer


def check_no_adapter(what: str, name: str) -> None:
    """Raises UserError for the folder of an adapter, which transformers leaves out without PEFT."""
    if (Path(name) / ADAPTER_CONFIG).is_file():
        raise UserError(f"{what} has an {ADAPTER_CONFIG}: {MERGE_ADAPTER}")


def load_adapted(
    name: str, what: str, adapters: tuple[Path, ...]
) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """The base of a folder of PEFT, with its low-rank adapter added to the weights.

    The base may be such a folder, too. The tokenizer is that of the folder, where it has one.
    Raises UserError for a missing base, for folders in a circle, and for an adapter that is more
    than W0 + scale B A.
    """
    folder, config = Path(name), read_json(Path(name) / ADAPTER_CONFIG)
    base = config.get("base_model_name_or_path")
    if not base:
        lacks = f"has an {ADAPTER_CONFIG} without base_model_name_or_path"
        raise UserError(f"{what} {name} {lacks}; write there which model it is for")
    if folder.resolve() in adapters:
        raise UserError(f"{what} {name}: the adapter is its own base; correct its {ADAPTER_CONFIG}")
    lm, tokenizer = load_lm(base, f"{what} {name}: its base", (*adapters, folder.resolve()))
    try:
        add_adapter_of(lm, config, read_adapter(folder))
    except (OSError, LookupError, AttributeError, ValueError, TypeError) as problem:
        reason = f"is no plain LoRA adapter of {base} ({first_line(problem)})"
        raise UserError(f"{what} {name} {reason}; {MERGE_ADAPTER}") from None
    except (RuntimeError, SafetensorError) as problem:
        raise UserError(f"{what} {name} does not fit {base}: {first_line(problem)}") from None
    lm.name_or_path = name
    if (folder / "tokenizer_config.json").is_file():
        tokenizer = load_tokenizer(name, what)
        check_tokenizer(f"{what} {name}", lm, tokenizer)
    return lm, tokenizer


def check_weights(
    what: str, model: nn.Module, report: dict, *, other_head: bool = False, new_head: bool = False
) -> None:
    """Raises UserError unless the files held every weight of the model, and no other one.

    transformers leaves out what a model does not use and draws what it lacks, without an error.
    `report` is its loading info. With `other_head` the files may hold a head that the model has
    not; with `new_head` they may lack its head, or have one of another shape.
    """
    # The body is `base_model` without a pooler, which is for a head and often not saved. A name
    # is of the body if it begins, behind the prefix of the body, like one there. So an additional
    # layer is of the body. A body with other names is refused too: then its weights are missing.
    body = {name.split(".")[0] for name in model.base_model.state_dict()} - {"pooler"}

    def is_head(name: str) -> bool:
        return name.removeprefix(f"{model.base_model_prefix}.").split(".")[0] not in body

    unused = {name for name in report["unexpected_keys"] if not COMPUTED.search(name)}
    adapter = {name for name in unused if ADAPTER.search(name)}
    if adapter:
        raise UserError(f"{what} holds {listed(adapter)} of an adapter: {MERGE_ADAPTER}")
    missing = set(report["missing_keys"])
    shapes = {name: (tuple(found), tuple(own)) for name, found, own in report["mismatched_keys"]}
    if new_head:
        missing = {name for name in missing if not is_head(name)}
        shapes = {name: both for name, both in shapes.items() if not is_head(name)}
    if other_head:
        unused = {name for name in unused if not is_head(name)}
    kind = type(model).__name__
    if missing:
        advice = "it was not trained for this use, or is incomplete"
        raise UserError(f"{what} lacks {listed(missing)} of {kind}: {advice}")
    if shapes:
        found, own = shapes[min(shapes)]
        example = f"the first is {found} in the files, {own} by config.json"
        raise UserError(f"{what} has {listed(shapes)} of another shape: {example}")
    if unused:
        advice = "its config.json is of another model, or it is no model of this kind"
        raise UserError(f"{what} holds {listed(unused)} that {kind} does not use: {advice}")


def release_files(model: nn.Module) -> None:
    """Copy the weights that are on the CPU: safetensors maps its files, and Windows and NFS cannot
    delete or rename a mapped file, such as the `final` that a run with --overwrite replaces."""
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()


def load_tokenizer(name: str, what: str = "model") -> PreTrainedTokenizerFast:
    """The tokenizer of a local folder or a hub id. Raises UserError that says what to do."""
    try:
        return AutoTokenizer.from_pretrained(name)
    except (*UNREADABLE, AttributeError) as problem:
        failure = f"has no tokenizer that can be read ({first_line(problem)})"
        raise UserError(f"{what} {name} {failure}; {SAVE_TOKENIZER}") from None


def check_tokenizer(name: str, lm: nn.Module, tokenizer) -> None:
    """Raises UserError unless there is a vocabulary with EOS, and an embedding for each id."""
    # transformers makes an empty tokenizer where a folder holds none.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(f"{name} has no tokenizer; {SAVE_TOKENIZER}")
    rows = lm.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        sizes = f"{len(tokenizer)} tokens but the model embeds only {rows}"
        raise UserError(f"{name}: the tokenizer has {sizes}; they do not belong together")
    if tokenizer.eos_token_id is None:
        why = "a response could never end; set eos_token in tokenizer_config.json"
        raise UserError(f"{name}: the tokenizer has no EOS token, so {why}")


def build_tiny(texts: list[str], seed: int = 0) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    """A Llama of about 1 M random parameters, and a BPE of at most 512 tokens trained on `texts`.

    Takes seconds. Any text can be encoded (all bytes are tokens); EOS is `<|endoftext|>`; there is
    no pad token, as in GPT-2.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TINY_LM["vocab_size"],
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|endoftext|>", clean_up_tokenization_spaces=False
    )
    sizes = {**TINY_LM, "vocab_size": len(tokenizer)}
    ends = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None)
    config = LlamaConfig(**sizes, **ends, tie_word_embeddings=True)
    with torch.random.fork_rng(devices=[]):  # leaves the caller's random state as it was
        torch.manual_seed(seed)
        lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return lm, tokenizer


def context_of_config(name: str) -> int:
    """`context_of` a model that is not loaded, in a folder or on the hub."""
    try:
        config = AutoConfig.from_pretrained(name)
    except UNREADABLE as problem:
        raise UserError(f"--model {name} has no config: {first_line(problem)}") from None
    return context_in(config)


def context_of(lm: nn.Module) -> int:
    """Tokens that a model can read at once; 10**9 where its config names no limit."""
    return context_in(lm.config)


def context_in(config) -> int:
    """`context_of` a model with this config."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or 10**9


def disable_dropout(lm: nn.Module) -> None:
    """Set every rate of dropout, layer-drop and router-jitter to 0, for training mode too."""
    for holder in [lm.config, *lm.modules()]:  # a rate may be in the config or in any module
        is_dropout = isinstance(holder, nn.modules.dropout._DropoutNd)
        for name, value in vars(holder).items():
            is_rate = "drop" in name or "jitter" in name or (is_dropout and name == "p")
            if is_rate and isinstance(value, float):
                setattr(holder, name, 0.0)


def fuse_activations(lm: nn.Module) -> None:
    """transformers writes GPT-2's GELU as eight elementwise operations; torch has it as one."""
    for module in lm.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, nn.GELU(approximate="tanh"))


# ------------------------------------------------------------------------ what the code assumes


def eight_tokens(lm: nn.Module) -> torch.Tensor:
    """Ids 0..7 as one row, (1, 8), on the model's device."""
    ids = torch.arange(8, device=lm.get_output_embeddings().weight.device)[None]
    return ids % lm.config.get_text_config().vocab_size


def accepts(module: nn.Module) -> set[str]:
    """The names of the arguments of a module's forward."""
    return set(inspect.signature(module.forward).parameters)


@torch.no_grad()
def check_architecture(lm: nn.Module) -> None:
    """Try on eight tokens three things that all code here assumes.

    A later token must not change an earlier one's scores; training mode must score like evaluation
    mode; and a row must score the same with padding on its left, since that is how prompts of
    unequal length are sampled. Raises UserError for a model that lacks one of them.
    """
    name, head = type(lm).__name__, lm.get_output_embeddings()
    if head is None or lm.base_model is lm or "input_ids" not in accepts(lm.base_model):
        built = "is not built as a decoder with an lm_head on top"
        raise UserError(f"{name} {built}, so it cannot be trained here")
    was_training = lm.training

    def logits(ids: torch.Tensor, mask: torch.Tensor, train: bool = False) -> torch.Tensor:
        """(1, t) each -> (1, t, V)."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": positions}
        inputs["use_cache"] = False  # `find_cache` tries it
        lm.train(train)
        known = {key: value for key, value in inputs.items() if key in accepts(lm)}
        return lm(**known).logits.float()

    ids = eight_tokens(lm)
    ones = torch.ones_like(ids)
    changed = ids.clone()
    changed[0, -1] = ids[0, 0]
    padded = torch.cat([ids[:, :3], ids], dim=1)
    padded_mask = torch.cat([torch.zeros_like(ids[:, :3]), ones], dim=1)
    plain = logits(ids, ones)
    differences = {
        "is not causal: a later token changes the scores of an earlier one": (
            logits(changed, ones)[:, :-1] - plain[:, :-1]
        ),
        "scores differently in training mode, so the PPO ratio could not start at 1": (
            logits(ids, ones, train=True) - plain
        ),
        "does not ignore padding on the left, so prompts of unequal length cannot be sampled": (
            logits(padded, padded_mask)[:, 3:] - plain
        ),
    }
    lm.train(was_training)
    tolerance = 1e-4 * float(plain.abs().max()) + 1e-4
    for problem, difference in differences.items():
        if not float(difference.abs().max()) <= tolerance:  # `not <=`: NaN fails too
            raise UserError(f"{name} {problem}; it cannot be trained here")


@torch.no_grad()
def find_logit_transform(lm: nn.Module) -> tuple[float, float | None]:
    """(scale, cap): the LM's logits are cap * tanh(scale * lm_head(hidden) / cap).

    Without a cap (None) they are scale * lm_head(hidden). Gemma caps its logits, Cohere and Granite
    scale them. The cap is read from the config, the scale is measured on eight tokens; then the
    formula is compared with the LM's own logits. Raises UserError where they differ.
    """
    was_training = lm.training
    lm.eval()
    ids = eight_tokens(lm)  # (1, 8)
    mask = torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask}
    inputs |= {"use_cache": False} if "use_cache" in accepts(lm) else {}
    hidden = lm.base_model(**inputs).last_hidden_state  # (1, 8, H)
    # float64 by NumPy: a device such as MPS has none
    logits = lm(**inputs).logits.cpu().numpy().astype(np.float64)  # (1, 8, V)
    plain = lm.get_output_embeddings()(hidden).cpu().numpy().astype(np.float64)  # (1, 8, V)
    lm.train(was_training)
    config = lm.config.get_text_config()
    caps = [float(getattr(config, name)) for name in CAP_NAMES if getattr(config, name, None)]
    cap = caps[0] if caps else None
    # Undo the cap; the factor that remains is estimated by least squares.
    linear = logits if cap is None else cap * np.arctanh(logits / cap)
    scale = float((linear * plain).sum() / max((plain * plain).sum(), 1e-30))
    scale = float(f"{scale:.5g}") if scale else 1.0  # 1.0000003 -> 1
    predicted = scale * plain if cap is None else cap * np.tanh(scale * plain / cap)
    if not np.allclose(predicted, logits, rtol=1e-3, atol=1e-3 * np.abs(logits).max()):
        change = "its logits after lm_head in a way that is neither a factor nor a soft cap"
        advice = "extend find_logit_transform (lm.py) and HybridModel.logits (hybrid.py)"
        raise UserError(f"{type(lm).__name__} changes {change}; {advice}")
    return scale, cap


_without_cache: set[str] = set()  # what `find_cache` has said already


@torch.no_grad()
def find_cache(lm: nn.Module) -> str | None:
    """The argument by which the LM takes a DynamicCache: its name differs between releases of
    transformers. None, and one line that says why, where decoding must do without a cache.

    Tried on eight tokens as the sampler uses it: two rows, one padded on its left; a cached step;
    the other row is dropped; another cached step. Both must give the states of the whole row.
    """
    known = accepts(lm.base_model)
    name = next((name for name in ("cache", "past_key_values") if name in known), None)
    was_training = lm.training
    lm.eval()
    try:
        problem = _cache_problem(lm, name)
    except Exception as error:  # a model's own cache may raise anything
        problem = first_line(error)
    lm.train(was_training)
    if problem is None:
        return name
    line = f"{type(lm).__name__} samples without a cache, which is slower: {problem}"
    if line not in _without_cache:
        _without_cache.add(line)
        print(line)
    return None


def _cache_problem(lm: nn.Module, name: str | None) -> str | None:
    """None where a cache works on eight tokens. What it raises is a problem too."""
    if getattr(lm, "_is_stateful", False):  # Mamba, ...
        return "it is recurrent, and its decoding step cannot skip padding on the left"
    if name is None:
        return "it takes no DynamicCache"
    ids = eight_tokens(lm)  # (1, 8)
    rows = torch.cat([ids, ids.roll(3, dims=1)])  # (2, 8)
    mask = torch.ones_like(rows)
    mask[1, :3] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)  # (2, 8)

    def read(kept: list[int], begin: int, end: int, **options) -> torch.Tensor:
        """The last hidden state of those rows after columns begin..end-1: (rows, H)."""
        inputs = {
            "input_ids": rows[kept, begin:end],
            "attention_mask": mask[kept, :end],
            "position_ids": positions[kept, begin:end],
        }
        known = {key: value for key, value in inputs.items() if key in accepts(lm.base_model)}
        return lm.base_model(**known, **options).last_hidden_state[:, -1]

    cache = DynamicCache(config=lm.config)
    cached = {name: cache, "use_cache": True}
    read([0, 1], 0, 6, **cached)
    steps = [read([0, 1], 6, 7, **cached)]
    cache.batch_select_indices(torch.tensor([1], device=rows.device))
    steps.append(read([1], 7, 8, **cached))
    whole = [read([0, 1], 0, 7, use_cache=False), read([1], 0, 8, use_cache=False)]
    difference, size = torch.cat(steps) - torch.cat(whole), torch.cat(whole).abs().max()  # (3, H)
    if float(difference.abs().max()) <= 1e-4 * float(size):
        return None
    return "a cached step gives other states than the whole row"


@torch.no_grad()
def can_pack(lm: nn.Module) -> bool:
    """Do two texts in one row, told apart by position ids alone, score as they do alone?

    Tried on eight tokens. True for attention with position ids; recurrent models and ALiBi would
    mix the texts.
    """
    if "position_ids" not in accepts(lm.base_model):
        return False
    ids = eight_tokens(lm)  # (1, 8)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]], device=ids.device)

    def read(ids: torch.Tensor, **inputs) -> torch.Tensor:
        return lm.base_model(input_ids=ids, use_cache=False, **inputs).last_hidden_state

    together = read(ids, position_ids=positions)  # (1, 8, H)
    alone = torch.cat([read(ids[:, :3]), read(ids[:, 3:])], dim=1)  # (1, 8, H)
    return bool((together - alone).abs().max() <= 1e-4 * alone.abs().max())


# ------------------------------------------------------------------------------------------ packing


def states_before(
    read: Callable,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    response_mask: torch.Tensor,
    packs: bool,
) -> torch.Tensor:
    """`HybridModel.states_before`, (N, H), without work for padding where `packs`.

    `read(input_ids, position_ids=...)` gives the hidden states of rows. Under causal attention no
    token sees the padding on its right, so the LM needs no mask. Where that padding is a tenth of
    the batch or more, short rows share a row of the LM, and no text sees another.
    """
    # (B, t) each, t = T - 1: no token of a row follows its last one.
    input_ids, real = input_ids[:, :-1], attention_mask[:, 1:]
    rows, width = input_ids.shape
    # (B,) where each row begins in the flattened input of the LM
    begins = torch.arange(rows, device=input_ids.device) * width
    position_ids = None
    lengths = real.sum(1).tolist()  # B
    if packs and sum(lengths) < 0.9 * rows * width:
        bins, columns, bin_width = pack(lengths)
        flat = [b * bin_width + column for b, column in zip(bins, columns)]
        begins = torch.tensor(flat, device=input_ids.device)
        column = torch.arange(width, device=input_ids.device).expand(rows, -1)  # (B, t)
        to = (begins[:, None] + column)[real]  # (tokens,) where each token goes
        # Ids and positions; a position of 0 begins a text.
        packed = input_ids.new_zeros(2, (max(bins) + 1) * bin_width)
        packed[0, to], packed[1, to] = input_ids[real], column[real]
        input_ids, position_ids = packed.view(2, -1, bin_width)  # (bins, bin_width) each
    hidden = read(input_ids, position_ids=position_ids)  # (B, t, H), or (bins, bin_width, H)
    row, column = response_mask[:, 1:].nonzero(as_tuple=True)  # (N,): column t-1 predicts token t
    return hidden.flatten(0, 1).index_select(0, begins[row] + column)


def pack(lengths: list[int]) -> tuple[list[int], list[int], int]:
    """Put texts of these lengths side by side into few bins of one width.

    -> bin and first column of each text, and the width of the bins: at most 1, 1.25 or 1.5 times
    the longest text, whichever needs the fewest columns in all.

    >>> pack([2, 5, 3])
    ([1, 0, 1], [3, 0, 0], 5)
    """
    best, best_size = None, 0
    for quarters in (4, 5, 6):
        bins, begins, width = _first_fit(lengths, max(lengths) * quarters // 4)
        size = (max(bins) + 1) * width
        if best is None or size < best_size:
            best, best_size = (bins, begins, width), size
    return best


def _first_fit(lengths: list[int], width: int) -> tuple[list[int], list[int], int]:
    """The longest text first, each into the first bin with room; as wide as the fullest bin."""
    bins, begins = [0] * len(lengths), [0] * len(lengths)
    used: list[int] = []  # columns that are taken in each bin
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        b = 0
        while b < len(used) and used[b] + lengths[i] > width:
            b += 1
        if b == len(used):
            used.append(0)
        bins[i], begins[i] = b, used[b]
        used[b] += lengths[i]
    return bins, begins, max(used)
