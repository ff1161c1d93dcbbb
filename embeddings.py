"""Sentence embeddings, computed as sentence-transformers computes them, without that package.

Its folders say what they do: `modules.json` lists the steps, `1_Pooling/config.json` how the hidden
states of the tokens become one vector, `sentence_bert_config.json` how long a text may be: a longer
one loses its end. A model without these files gets the mean of its last hidden states.
Left out on purpose: layers after pooling (Dense), prompts, Router; a model that needs one is
refused, since its numbers would be others. Normalize has no effect on a cosine.

    python -m pytest -q tests/test_reward_models.py -k cosine
"""

import json
import logging
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoModel

from classifiers import BATCH_SIZE, load_judge, tokenize
from engine import UserError, first_line

# Names of a pooling mode: in files of today, and the switch in older ones.
SWITCHES = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
# The settings of a Transformer module have had the name of its architecture.
KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
USUAL = {  # what settings may say without any effect on these numbers
    "transformer_task": ("feature-extraction",),
    "module_output_name": ("token_embeddings",),
    "config_args": ({},),
    "config_kwargs": ({},),
    "tokenizer_args": ({},),
    "processor_kwargs": ({},),
    "processing_kwargs": ({},),
}
FORWARD = {"method": "forward", "method_output_name": "last_hidden_state"}
NO_EFFECT = ("Normalize", "Dropout")  # on a cosine, and in evaluation


def pool(hidden: torch.Tensor, mask: torch.Tensor, modes: tuple[str, ...]) -> torch.Tensor:
    """Last hidden states (b, T, H), right padded, and their mask (b, T) -> embeddings (b, H) for
    each mode, joined to (b, H * modes)."""
    real = mask[:, :, None].to(hidden.dtype)  # (b, T, 1)
    n = real.sum(1)  # (b, 1) tokens
    rows = torch.arange(len(hidden), device=hidden.device)  # (b,)
    position = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[None, :, None]
    weights = real * position  # (b, T, 1) the weight of a token is its position, from 1
    ways = {
        "cls": lambda: hidden[:, 0],
        "max": lambda: hidden.masked_fill(real == 0, -torch.inf).max(1).values,
        "mean": lambda: (hidden * real).sum(1) / n,
        "mean_sqrt_len_tokens": lambda: (hidden * real).sum(1) / n.sqrt(),
        "weightedmean": lambda: (hidden * weights).sum(1) / weights.sum(1),
        "lasttoken": lambda: hidden[rows, mask.sum(1) - 1],
    }
    return torch.cat([ways[mode]() for mode in modes], dim=1)


class SentenceEncoder:
    """A model of a folder or hub id that turns texts into embeddings.

    Raises UserError, in one line, for a model whose embeddings need more than is computed here.
    """

    def __init__(self, name: str, device=None):
        modules = _read_json(name, "modules.json")
        subfolder, settings, self.modes = "", {}, ("mean",)
        # On the hub, a model without that list is none of sentence-transformers.
        if modules is not None or Path(name).is_dir():
            subfolder, pooling_folder = _folders(name, modules)
            settings, self.modes = _settings(name, subfolder), _modes(name, pooling_folder)
        self.lower_case = bool(settings.get("do_lower_case"))
        self.model, self.tokenizer = load_judge(AutoModel, name, device, subfolder)
        if self.model.config.is_encoder_decoder:
            raise _not_computed(name, "is an encoder-decoder; expected an encoder or a decoder")
        self.tokenizer.truncation_side = "right"
        if settings.get("max_seq_length"):
            self.tokenizer.model_max_length = settings["max_seq_length"]

    @torch.no_grad()
    def embed(self, texts: list[str]) -> torch.Tensor:
        """(N, H) on the CPU, BATCH_SIZE texts at a time."""
        if self.lower_case:
            texts = [text.lower() for text in texts]
        embeddings = []
        for i in range(0, len(texts), BATCH_SIZE):
            some = texts[i : i + BATCH_SIZE]
            # The model's own limit, and no other one: the embedding of a part is another.
            batch = tokenize(self.tokenizer, self.model, some, max_length=10**9)
            hidden = self.model(**batch).last_hidden_state.float()  # (b, T, H)
            embeddings.append(pool(hidden, batch["attention_mask"], self.modes).cpu())
        return torch.cat(embeddings)


def _folders(name: str, modules: list[dict] | None) -> tuple[str, str]:
    """The folders of the transformer and of its pooling, inside the model's. Raises UserError for
    modules that are not computed here."""
    if modules is None:
        return "", "1_Pooling"
    kinds = [str(module["type"]) for module in modules]
    steps = [kind.rpartition(".")[2] for kind in kinds]
    is_known = all(kind.startswith("sentence_transformers.") for kind in kinds)
    if not is_known or steps[:2] != ["Transformer", "Pooling"] or set(steps[2:]) - set(NO_EFFECT):
        expected = "Transformer, Pooling and maybe Normalize are computed here"
        raise _not_computed(name, f"has the modules {', '.join(steps)}; {expected}")
    config = _read_json(name, "config_sentence_transformers.json") or {}
    prompt = config.get("default_prompt_name")
    if prompt is not None:
        what = f"puts its prompt {prompt!r} before every text"
        raise _not_computed(name, f"{what}; a model without a default prompt is expected")
    return modules[0]["path"], modules[1]["path"]


def _settings(name: str, folder: str) -> dict:
    """What the Transformer module says about lengths and lower case."""
    files = (f"sentence_{kind}_config.json" for kind in KINDS)
    paths = (f"{folder}/{file}" if folder else file for file in files)
    settings = next((found for found in (_read_json(name, path) for path in paths) if found), {})
    for key, usual in USUAL.items():
        if key in settings and settings[key] not in usual:
            raise _not_computed(name, f"sets {key} to {settings[key]!r}")
    way = settings.get("modality_config", {}).get("text", FORWARD)
    if way != FORWARD:
        raise _not_computed(name, f"embeds texts by {way!r}")
    return settings


def _modes(name: str, folder: str) -> tuple[str, ...]:
    """The pooling modes of a config, old or new; mean, where it names none."""
    config = _read_json(name, f"{folder}/config.json") or {}
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for mode, switch in SWITCHES.items() if config.get(switch)] or ["mean"]
    modes = (modes,) if isinstance(modes, str) else tuple(modes)
    if set(modes) - set(SWITCHES):
        known = ", ".join(SWITCHES)
        raise _not_computed(name, f"has the pooling {', '.join(modes)}; known are {known}")
    return modes


def _not_computed(name: str, what: str) -> UserError:
    return UserError(f"cosine_sts({name!r}): the model {what}; name another model")


def _read_json(name: str, path: str):
    """What a JSON file of a model's folder or hub id holds; None where it has no such file.

    Raises UserError where that cannot be known, or the file cannot be read.
    """
    what = f"cosine_sts({name!r}): {path}"
    try:
        if Path(name).is_dir():
            file = Path(name) / path
            return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        cached = try_to_load_from_cache(name, path)
        if cached is not None and not isinstance(cached, str):
            return None  # the hub has said that there is none
        # Only the result matters, not the hub's messages about its retries.
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
        return json.loads(Path(cached or hf_hub_download(name, path)).read_text(encoding="utf-8"))
    except LocalEntryNotFoundError as problem:  # a kind of EntryNotFoundError, and not the same
        advice = "give a downloaded folder, or a network"
        raise UserError(f"{what} cannot be looked up ({first_line(problem)}); {advice}") from None
    except EntryNotFoundError:
        return None
    except (OSError, ValueError) as problem:
        raise UserError(f"{what} cannot be read ({first_line(problem)})") from None
