"""Rewards that ask a second model: classifiers, embeddings, reward models, entailment, likelihood, a judge that reads a rubric.

Text in, floats out: the judge tokenises for itself, so its vocabulary may be another one than the policy's. All are batched, in eval
mode, without gradients, on the run's device. Each function here makes a reward `f(prompts, completions, **columns) -> list[float]`.
Left out on purpose: training a judge (reward_model.py does that), pairwise tournaments.

    python train.py --reward 'classifier("path/or/hub-id", label="POSITIVE")'
    python train.py --reward 'judge("http://127.0.0.1:8000/v1", rubric="Is the answer polite?")'
"""

import copy
import http.client
import json
import math
import re
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from typing import Callable

import torch
from safetensors import SafetensorError
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from engine import UserError, first_line
from lm import context_of, load_lm

BATCH_SIZE = 16  # texts that a judge reads together
MAX_LENGTH = 1024  # tokens; what is longer loses its beginning, so that the end of the response is always read


def load_judge(auto_class, name: str, device) -> tuple[torch.nn.Module, object]:
    """A frozen model and its own tokenizer from a folder or hub id. Raises UserError."""
    try:
        model, report = auto_class.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as problem:
        raise UserError(
            f"reward model {name} cannot be loaded ({first_line(problem)}); give a folder, or a hub id and a network"
        ) from None
    missing = [key for key in report["missing_keys"] if not key.startswith("pooler")]
    if missing:
        raise UserError(
            f"reward model {name} lacks the weights {', '.join(sorted(missing)[:3])}: it was not trained for this use"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # a filler under a mask of 0
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"
    return model.to(device or "cpu").eval().requires_grad_(False), tokenizer


def tokenize(
    tokenizer, model, texts: list[str], pairs: list[str] | None = None
) -> dict[str, torch.Tensor]:
    """One padded batch on the model's device; each (b, T). A text without tokens is read as one EOS (or pad) token."""
    limit = min(MAX_LENGTH, context_of(model), tokenizer.model_max_length)
    limit -= 2 if "roberta" in model.config.model_type else 0  # its positions start at 2
    inputs = tokenizer(
        texts, pairs, truncation=True, max_length=limit, padding=True, return_tensors="pt"
    )
    if inputs["input_ids"].shape[1] == 0:  # every text of the batch is empty
        inputs = tokenizer(
            [tokenizer.pad_token] * len(texts), return_tensors="pt", add_special_tokens=False
        )
    inputs["attention_mask"][inputs["attention_mask"].sum(1) == 0, 0] = 1
    return {name: value.to(next(model.parameters()).device) for name, value in inputs.items()}


def sequence_logits(
    model, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs
) -> torch.Tensor:
    """Class logits of a sequence classifier, (b, T) -> (b, C). Decoders are read at the LAST REAL TOKEN, by the mask.

    Hugging Face finds that token by `ids != pad`, which is wrong as soon as pad doubles as EOS; encoders read their first token.
    """
    if not hasattr(model, "score"):
        return model(input_ids=input_ids, attention_mask=attention_mask, **inputs).logits.float()
    hidden = model.base_model(
        input_ids=input_ids, attention_mask=attention_mask
    ).last_hidden_state  # (b, T, H)
    column = torch.arange(input_ids.shape[1], device=input_ids.device)  # (T,)
    last = torch.where(attention_mask.bool(), column, -1).max(1).values  # (b,)
    return model.score(hidden[torch.arange(len(hidden), device=hidden.device), last]).float()


@torch.no_grad()
def batched_logits(
    model, tokenizer, texts: list[str], pairs: list[str] | None = None
) -> torch.Tensor:
    """(N, C) logits on the CPU, BATCH_SIZE texts at a time."""
    parts = []
    for i in range(0, len(texts), BATCH_SIZE):
        batch = tokenize(
            tokenizer,
            model,
            texts[i : i + BATCH_SIZE],
            pairs[i : i + BATCH_SIZE] if pairs else None,
        )
        parts.append(sequence_logits(model, **batch).cpu())
    return torch.cat(parts)


def _label_index(model, label: str | int | None, name: str) -> int:
    labels = {str(text).lower(): int(i) for i, text in model.config.id2label.items()}
    if label is None and len(labels) == 2:
        return 1
    if isinstance(label, int) and 0 <= label < len(labels):
        return label
    if isinstance(label, str) and label.lower() in labels:
        return labels[label.lower()]
    raise UserError(
        f"classifier({name!r}, label={label!r}): the model's labels are {', '.join(labels)}"
    )


def classifier(context: dict, id: str, label: str | int | None = None) -> Callable:
    """P(label | completion), 0..1. Two-class models may leave the label out: the second class. Multi-label models use sigmoid."""
    model, tokenizer = load_judge(AutoModelForSequenceClassification, id, context.get("device"))
    index = _label_index(model, label, id)
    multi_label = (
        model.config.problem_type == "multi_label_classification" or model.config.num_labels == 1
    )

    def reward(prompts, completions, **columns):
        logits = batched_logits(model, tokenizer, completions)  # (N, C)
        return (logits.sigmoid() if multi_label else logits.softmax(-1))[:, index].tolist()

    return reward


def reward_model(context: dict, path: str) -> Callable:
    """The scalar of an AutoModelForSequenceClassification(num_labels=1) on prompt + completion, less `reward_mean`, over `reward_std`.

    The two numbers stand in the config of models from reward_model.py; others are taken as they are (0 and 1).
    """
    model, tokenizer = load_judge(AutoModelForSequenceClassification, path, context.get("device"))
    if model.config.num_labels != 1:
        raise UserError(
            f"model({path!r}) has {model.config.num_labels} classes, expected 1 score; classifier(...) reads classes"
        )
    mean, std = getattr(model.config, "reward_mean", 0.0), getattr(model.config, "reward_std", 1.0)

    def reward(prompts, completions, **columns):
        texts = [
            prompt + completion for prompt, completion in zip(prompts, completions, strict=True)
        ]
        return ((batched_logits(model, tokenizer, texts)[:, 0] - mean) / std).tolist()

    return reward


def nli(context: dict, id: str) -> Callable:
    """P(entailment) - P(contradiction) of the completion, given the target as premise; -1..1. For factuality."""
    model, tokenizer = load_judge(AutoModelForSequenceClassification, id, context.get("device"))
    found = {
        kind: [int(i) for i, text in model.config.id2label.items() if kind in str(text).lower()]
        for kind in ("entail", "contradict")
    }
    if not all(len(indices) == 1 for indices in found.values()):
        raise UserError(
            f"nli({id!r}): expected labels entailment and contradiction, found {', '.join(map(str, model.config.id2label.values()))}"
        )
    (yes,), (no,) = found.values()

    def reward(prompts, completions, **columns):
        p = batched_logits(model, tokenizer, _targets(columns, "nli"), completions).softmax(
            -1
        )  # (N, C)
        return (p[:, yes] - p[:, no]).tolist()

    return reward


def bleurt(context: dict, id: str) -> Callable:
    """The scalar that a pair classifier gives to (target, completion), as BLEURT checkpoints do (Sellam et al. 2020)."""
    model, tokenizer = load_judge(AutoModelForSequenceClassification, id, context.get("device"))
    if model.config.num_labels != 1:
        raise UserError(f"bleurt({id!r}) has {model.config.num_labels} classes, expected 1 score")
    return lambda prompts, completions, **columns: batched_logits(
        model, tokenizer, _targets(columns, "bleurt"), completions
    )[:, 0].tolist()


def cosine_sts(context: dict, id: str | None = None) -> Callable:
    """Cosine of the mean-pooled last hidden states of completion and target; -1..1. Without an id: by the starting model itself."""
    if id is not None:
        model, tokenizer = load_judge(AutoModel, id, context.get("device"))
    else:
        lm, tokenizer = frozen_lm(context, "cosine_sts", None)
        model = lm.base_model

    @torch.no_grad()
    def embed(texts: list[str]) -> torch.Tensor:  # (N, H)
        parts = []
        for i in range(0, len(texts), BATCH_SIZE):
            batch = (
                _plain_batch(tokenizer, model, texts[i : i + BATCH_SIZE])
                if id is None
                else tokenize(tokenizer, model, texts[i : i + BATCH_SIZE])
            )
            hidden = model(**batch).last_hidden_state.float()  # (b, T, H)
            mask = batch["attention_mask"][:, :, None]  # (b, T, 1)
            parts.append(((hidden * mask).sum(1) / mask.sum(1)).cpu())
        return torch.cat(parts)

    return lambda prompts, completions, **columns: torch.cosine_similarity(
        embed(completions), embed(_targets(columns, "cosine_sts"))
    ).tolist()


def gptscore(context: dict, id: str | None = None, template: str = "{prompt}") -> Callable:
    """Mean log-probability, in nats, of the completion's tokens after the filled-in template (Fu et al. 2302.04166, eq. 1, equal weights).

    `{prompt}` and the data's columns may stand in the template. Without an id the starting model is asked. An empty completion
    scores like a uniform guess, -log V, which is worse than any real text.
    """
    from rewards import perplexity

    lm, tokenizer = frozen_lm(context, "gptscore", id)
    worst = -math.log(lm.config.get_text_config().vocab_size)

    def reward(prompts, completions, **columns):
        contexts = _filled(template, prompts, columns)
        scores = [-math.log(value) for value in perplexity(lm, tokenizer, completions, contexts)]
        return [worst if score == -math.inf else score for score in scores]

    return reward


DEFAULT_RUBRIC = "How good is the response: fluent, relevant to the prompt, and true?"
QUESTION = "{rubric}\n\nPrompt:\n{prompt}\n\nResponse:\n{completion}\n\nGrade the response from 1 (worst) to {top} (best). Answer with the number alone.\nGrade:"


def judge(
    context: dict,
    id_or_url: str,
    rubric: str = DEFAULT_RUBRIC,
    top: int = 5,
    model: str = "default",
    timeout: float = 30,
    retries: int = 2,
) -> Callable:
    """A grade by a language model that reads a rubric, mapped from 1..top to 0..1.

    A local model (folder or hub id) gives the expected grade over the digit tokens. An `http(s)://.../v1` endpoint that speaks
    OpenAI's chat API (vLLM, Ollama, llama.cpp) is asked for a number, `retries` times more if it is late, broken or says something
    else; answers are cached. A text that got no grade has NO score: it is left out of the update and counted, never scored as 0.
    """
    if (
        type(timeout) not in (int, float)
        or not timeout > 0
        or type(retries) is not int
        or retries < 0
    ):
        raise UserError(
            f"judge(timeout={timeout!r}, retries={retries!r}): expected seconds above 0 and a whole number of at least 0"
        )
    if not (isinstance(top, int) and 2 <= top <= 9):
        raise UserError(
            f"judge(top={top!r}): expected a whole number from 2 to 9, so that a grade is one digit"
        )
    ask = (
        _endpoint(id_or_url, model, top, timeout, retries)
        if id_or_url.startswith(("http://", "https://"))
        else _local(context, id_or_url, top)
    )

    def reward(prompts, completions, **columns):
        questions = [
            QUESTION.format(rubric=rubric, prompt=p, completion=c, top=top)
            for p, c in zip(prompts, completions, strict=True)
        ]
        return [None if grade is None else (grade - 1) / (top - 1) for grade in ask(questions)]

    reward.may_abstain = True
    return reward


def _local(context: dict, id: str, top: int) -> Callable[[list[str]], list[float]]:
    """Expected grade under the next-token distribution restricted to the digits 1..top."""
    lm, tokenizer = frozen_lm(context, "judge", id)
    digits = []  # (top, variants): a digit may be one token with and one without a space before it
    for digit in range(1, top + 1):
        variants = {
            ids[-1]
            for text in (str(digit), f" {digit}")
            if len(ids := tokenizer(text, add_special_tokens=False).input_ids) <= 2
        }
        variants = [i for i in variants if tokenizer.decode([i]).strip() == str(digit)]
        if not variants:
            raise UserError(
                f"judge({id!r}): the model's tokenizer has no token for the digit {digit}"
            )
        digits.append(variants)

    @torch.no_grad()
    def ask(questions: list[str]) -> list[float]:
        grades = []
        for question in questions:  # one at a time: questions are long and of unequal length
            messages = [{"role": "user", "content": question}]
            if tokenizer.chat_template:
                question = tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            ids = tokenizer(question, add_special_tokens=not tokenizer.chat_template).input_ids[
                -context_of(lm) :
            ]
            logits = (
                lm(input_ids=torch.tensor([ids], device=next(lm.parameters()).device))
                .logits[0, -1]
                .float()
            )  # (V,)
            by_digit = torch.stack([logits[variants].logsumexp(0) for variants in digits])  # (top,)
            grades.append(float((by_digit.softmax(0).cpu() * torch.arange(1, top + 1)).sum()))
        return grades

    return ask


def _endpoint(
    url: str, model: str, top: int, timeout: float, retries: int
) -> Callable[[list[str]], list[float | None]]:
    """Ask an OpenAI-compatible endpoint, eight questions at a time; None for a question without a usable answer."""
    cache: dict[str, float] = {}
    address = url.rstrip("/") + "/chat/completions"

    def ask_once(question: str) -> float | None:
        body = {
            "model": model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0,
            "max_tokens": 16,
        }
        request = urllib.request.Request(
            address, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                answer = json.load(response)["choices"][0]["message"]["content"]
        except (
            OSError,
            http.client.HTTPException,
            ValueError,
            KeyError,
            IndexError,
            TypeError,
        ):  # late, refused, status 4xx/5xx, not JSON, not that JSON
            return None
        # A number alone, or "Grade: 4", "4 / 5", "2.5 of 5"; the first number of a sentence may be anything.
        number = re.fullmatch(
            r"\W*(?:(?:grade|score|rating)\W*)?(?<!-)(\d+(?:\.\d+)?)(?:\s*(?:/|of|out of)\s*\d+)?\W*",
            str(answer),
            re.IGNORECASE,
        )
        return float(number.group(1)) if number and 1 <= float(number.group(1)) <= top else None

    def ask_patiently(question: str) -> float | None:
        for _ in range(retries + 1):
            if question not in cache and (grade := ask_once(question)) is not None:
                cache[question] = grade
        return cache.get(question)

    def ask(questions: list[str]) -> list[float | None]:
        with ThreadPoolExecutor(max_workers=8) as pool:
            return list(pool.map(ask_patiently, questions))

    return ask


def comet(context: dict, id: str) -> Callable:
    """COMET (Rei et al. 2020) with the prompt as source and the target as reference, through the package unbabel-comet."""
    try:
        from comet import download_model, load_from_checkpoint
    except ImportError:
        raise UserError(
            "comet(...) needs the package unbabel-comet: pip install unbabel-comet"
        ) from None
    model = load_from_checkpoint(id if id.endswith(".ckpt") else download_model(id))

    def reward(prompts, completions, **columns):
        data = [
            {"src": p, "mt": c, "ref": t}
            for p, c, t in zip(prompts, completions, _targets(columns, "comet"), strict=True)
        ]
        return list(
            model.predict(
                data,
                batch_size=BATCH_SIZE,
                gpus=int(str(context.get("device", "cpu")).startswith("cuda")),
            ).scores
        )

    return reward


def frozen_lm(context: dict, name: str, id: str | None):
    """A causal LM that never changes, and its tokenizer: the folder or hub id, else a copy of `context["model"]` as it is now.

    `train.py` puts the policy there before training. Raises UserError, naming the reward, where there is neither.
    """
    if id is not None:
        lm, tokenizer = load_lm(id)
        lm = lm.to(context.get("device", "cpu"))
    elif "model" in context:
        lm, tokenizer = copy.deepcopy(context["model"]), context["tokenizer"]
    else:
        raise UserError(f'reward {name!r} needs a model to ask: name one, {name}("gpt2")')
    return lm.eval().requires_grad_(False), tokenizer


def _plain_batch(tokenizer, model, texts: list[str]) -> dict[str, torch.Tensor]:
    """Right-padded ids for a causal LM whose tokenizer may have no pad token."""
    filler = tokenizer.eos_token_id
    rows = [tokenizer(text).input_ids[-context_of(model) :] or [filler] for text in texts]
    width = max(len(row) for row in rows)
    device = next(model.parameters()).device
    ids = torch.tensor(
        [row + [filler] * (width - len(row)) for row in rows], device=device
    )  # (b, T)
    mask = torch.tensor(
        [[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device
    )  # (b, T)
    return {"input_ids": ids, "attention_mask": mask}


def _targets(columns: dict, name: str) -> list[str]:
    if "target" not in columns:
        raise UserError(
            f"reward '{name}' compares with a reference text, but the data has no target"
        )
    return columns["target"]


def _filled(template: str, prompts: list[str], columns: dict) -> list[str]:
    try:
        return [
            template.format(
                **{**{name: values[i] for name, values in columns.items()}, "prompt": prompt}
            )
            for i, prompt in enumerate(prompts)
        ]
    except (KeyError, IndexError) as problem:
        raise UserError(
            f"gptscore: the template {template!r} asks for {problem}, which is no column of the data"
        ) from None


# name -> (make(context, ...) -> reward function, "range, needs: meaning")
JUDGES: dict[str, tuple[Callable, str]] = {
    "classifier": (classifier, "0..1, id, label=: probability that a classifier gives the label"),
    "model": (
        reward_model,
        "any, id: scalar reward model on prompt + completion (see reward_model.py)",
    ),
    "cosine_sts": (
        cosine_sts,
        "-1..1, target, id or the starting model: cosine of mean-pooled embeddings",
    ),
    "nli": (nli, "-1..1, target, id: entailed by the target minus contradicting it"),
    "gptscore": (
        gptscore,
        "nats below 0, id or the starting model, template=: mean log-probability of the completion",
    ),
    "judge": (
        judge,
        "0..1, id or http://.../v1, rubric=: grade by a language model; no answer is no score",
    ),
    "bleurt": (bleurt, "any, target, id: a BLEURT checkpoint"),
    "comet": (comet, "about 0..1, target, id: COMET through unbabel-comet"),
}
