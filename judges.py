"""Rewards that ask a model: classifiers, embeddings, reward models, entailment, likelihood, judges.

Text in, floats out: each model uses its own tokenizer, so its vocabulary may differ from the
policy's. All are batched, in eval mode, without gradients, on the run's device. Each function here
makes a reward function  f(prompts, completions, **columns) -> list[float]; the table JUDGES names
them for rewards.py. Left out on purpose: training a judge (reward_model.py does that), pairwise
tournaments.

    python train.py --reward 'classifier("path/or/hub-id", label="POSITIVE")'
    python train.py --reward 'judge("http://127.0.0.1:8000/v1", rubric="Is the answer polite?")'
"""

import copy
import math
from collections.abc import Callable

import torch
from transformers import AutoModelForSequenceClassification

import parallel
from classifiers import BATCH_SIZE, HOW, PAIR, TEXT, Scorer, batched_logits, input_form, load_judge
from data import Example, encode_prompt, encode_target
from embeddings import SentenceEncoder, pool
from endpoint import grader
from engine import UserError
from lm import context_of, load_lm

# ------------------------------------------------------------------ classifiers and encoders


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
    """P(label | completion), 0..1. Without a label: that of the second class, if there are two."""
    model, tokenizer = load_judge(AutoModelForSequenceClassification, id, context.get("device"))
    index, config = _label_index(model, label, id), model.config
    multi_label = config.problem_type == "multi_label_classification" or config.num_labels == 1

    def reward(prompts, completions, **columns):
        logits = batched_logits(model, tokenizer, completions)  # (N, C)
        probabilities = logits.sigmoid() if multi_label else logits.softmax(-1)  # (N, C)
        return probabilities[:, index].tolist()

    return reward


def _load_scorer(context: dict, name: str, id: str) -> tuple[torch.nn.Module, object]:
    """A classifier of one class, whose logit is a score. Raises UserError, naming the reward."""
    model, tokenizer = load_judge(AutoModelForSequenceClassification, id, context.get("device"))
    if model.config.num_labels != 1:
        raise UserError(
            f"{name}({id!r}) has {model.config.num_labels} classes, expected 1 score; "
            "classifier(...) reads classes"
        )
    return model, tokenizer


def reward_model(context: dict, path: str, pair: bool | None = None) -> Callable:
    """(score - reward_mean) / reward_std of an answer to a prompt, by a classifier of one class.

    How it reads the two is said first; `pair` asks for a pair of texts, or forbids it. The two
    numbers stand in the config of models from reward_model.py; else they are 0 and 1.
    """
    if pair not in (None, True, False):
        raise ValueError(f"pair is True or False, found {pair!r}")
    model, tokenizer = _load_scorer(context, "model", path)
    name = f'model("{path}")'
    scorer = Scorer(name, model, tokenizer, input_form(name, model, tokenizer, pair))
    mean, std = getattr(model.config, "reward_mean", 0.0), getattr(model.config, "reward_std", 1.0)
    asked = " (pair=False: as one text)" if scorer.form == PAIR and pair is None else ""
    parallel.note(f"{name} reads prompts and answers {HOW[scorer.form]}{asked}")

    def reward(prompts, completions, **columns):
        return ((scorer.scores(prompts, completions).double() - mean) / std).tolist()

    reward.wants_messages = scorer.form != TEXT
    return reward


def nli(context: dict, id: str) -> Callable:
    """P(entailment) - P(contradiction) of the completion, the target being the premise; -1..1."""
    model, tokenizer = load_judge(AutoModelForSequenceClassification, id, context.get("device"))
    labels = {int(i): str(text) for i, text in model.config.id2label.items()}
    yes = [i for i, text in labels.items() if "entail" in text.lower()]
    no = [i for i, text in labels.items() if "contradict" in text.lower()]
    if len(yes) != 1 or len(no) != 1:
        raise UserError(
            f"nli({id!r}): expected labels entailment and contradiction, "
            f"found {', '.join(labels.values())}"
        )

    def reward(prompts, completions, **columns):
        logits = batched_logits(model, tokenizer, _targets(columns, "nli"), completions)  # (N, C)
        p = logits.softmax(-1)  # (N, C)
        return (p[:, yes[0]] - p[:, no[0]]).tolist()

    return reward


def bleurt(context: dict, id: str) -> Callable:
    """The score of (target, completion) by a BLEURT checkpoint (Sellam et al. 2020)."""
    model, tokenizer = _load_scorer(context, "bleurt", id)

    def reward(prompts, completions, **columns):
        logits = batched_logits(model, tokenizer, _targets(columns, "bleurt"), completions)
        return logits[:, 0].tolist()  # of (N, 1)

    return reward


def cosine_sts(context: dict, id: str | None = None) -> Callable:
    """Cosine of the sentence embeddings of completion and target; -1..1.

    By a model of sentence-transformers as it says itself; of others, and of the starting model,
    the mean of the last hidden states.
    """
    if id is not None:
        embed = SentenceEncoder(id, context.get("device")).embed
    else:
        lm, tokenizer = frozen_lm(context, "cosine_sts", None)

        @torch.no_grad()
        def embed(texts: list[str]) -> torch.Tensor:  # (N, H)
            embeddings = []
            for i in range(0, len(texts), BATCH_SIZE):
                batch = _plain_batch(tokenizer, lm, texts[i : i + BATCH_SIZE])
                hidden = lm.base_model(**batch).last_hidden_state.float()  # (b, T, H)
                embeddings.append(pool(hidden, batch["attention_mask"], ("mean",)).cpu())
            return torch.cat(embeddings)

    def reward(prompts, completions, **columns):
        targets = _targets(columns, "cosine_sts")
        return torch.cosine_similarity(embed(completions), embed(targets)).tolist()

    return reward


# ------------------------------------------------------------------ likelihood


def frozen_lm(context: dict, name: str, id: str | None):
    """A causal LM that never changes, and its tokenizer: of a folder or hub id, else a copy of
    `context["model"]` as it is now.

    `train.py` puts the policy there before training; a resumed run gives a function instead,
    `context["starting_model"]`, which loads the model that the run began with. Raises UserError,
    naming the reward, where there is none.
    """
    if id is not None:
        lm, tokenizer = load_lm(id)
        lm = lm.to(context.get("device", "cpu"))
    elif "starting_model" in context:
        model, tokenizer = context["starting_model"]()
        lm = model.lm.to(context["device"])
    elif "model" in context:
        lm, tokenizer = copy.deepcopy(context["model"]), context["tokenizer"]
    else:
        raise UserError(f'reward {name!r} needs a model to ask: name one, {name}("gpt2")')
    return lm.eval().requires_grad_(False), tokenizer


@torch.no_grad()
def perplexity(
    model, tokenizer, texts: list[str], contexts: list[str] | None = None, batch_size: int = 16
) -> list[float]:
    """exp(mean negative log-likelihood per token) of each text, given its context if it has one.

    `model` is a Hugging Face causal LM, unchanged. Context and text are tokenised apart; an
    empty context is BOS (EOS where there is none). A context that does not fit loses its beginning,
    a text its end. A text without tokens has no perplexity: it gets infinity, never a good score.
    """
    limit = context_of(model)
    rows = []  # (ids of the context, ids of the text)
    for text, context in zip(texts, contexts or [""] * len(texts), strict=True):
        ids = encode_target(tokenizer, text)[:-1][: limit - 1]  # without EOS
        context_ids = encode_prompt(tokenizer, Example(context, ""))
        rows.append((context_ids[-(limit - len(ids)) :], ids))
    result = []
    for i in range(0, len(rows), batch_size):
        result += _perplexities(model, rows[i : i + batch_size])
    return result


def _perplexities(model, rows: list[tuple[list[int], list[int]]]) -> list[float]:
    """The perplexity of each row (context ids, text ids); inf where there are no text ids."""
    device = next(model.parameters()).device
    lengths = torch.tensor(
        [[len(before), len(before) + len(ids)] for before, ids in rows]
    )  # (b, 2)
    n_context, n_all = lengths[:, :1], lengths[:, 1:]  # (b, 1) each
    width = int(n_all.max())
    padded = [before + ids + [0] * (width - len(before) - len(ids)) for before, ids in rows]
    input_ids = torch.tensor(padded, device=device)  # (b, T)
    column = torch.arange(width)[None]  # (1, T)
    attention_mask = (column < n_all).to(device)  # (b, T)
    is_text = ((column >= n_context) & (column < n_all)).to(device)[:, 1:]  # (b, T-1)
    outputs = model(input_ids=input_ids, attention_mask=attention_mask.long())
    logprobs = torch.log_softmax(outputs.logits[:, :-1].float(), dim=-1)  # (b, T-1, V)
    logprobs = logprobs.gather(2, input_ids[:, 1:, None]).squeeze(2)  # (b, T-1)
    result = []
    for row, mask in zip(logprobs, is_text):
        if mask.any():
            result.append(math.exp(min(-float(row[mask].mean()), 700.0)))
        else:
            result.append(math.inf)
    return result


def perplexity_reward(context: dict, model: str | None = None) -> Callable:
    """1 / perplexity of the completion after the prompt; 0..1."""
    lm, tokenizer = frozen_lm(context, "perplexity", model)

    def reward(prompts, completions, **columns):
        return [1 / value for value in perplexity(lm, tokenizer, completions, prompts)]

    return reward


def gptscore(context: dict, id: str | None = None, template: str = "{prompt}") -> Callable:
    """Mean log-probability, in nats, of the completion's tokens after the filled-in template (Fu et
    al. 2302.04166, eq. 1, equal weights).

    `{prompt}` and the data's fields may stand in the template. Without an id the starting model is
    asked. An empty completion gets the score of a uniform guess over the vocabulary, -log V.
    """
    lm, tokenizer = frozen_lm(context, "gptscore", id)
    uniform = -math.log(lm.config.get_text_config().vocab_size)

    def reward(prompts, completions, **columns):
        contexts = _filled(template, prompts, columns)
        scores = [-math.log(value) for value in perplexity(lm, tokenizer, completions, contexts)]
        return [uniform if score == -math.inf else score for score in scores]

    return reward


# ------------------------------------------------------------------ a judge that reads a rubric

DEFAULT_RUBRIC = "How good is the response: fluent, relevant to the prompt, and true?"
QUESTION = """{rubric}

Prompt:
{prompt}

Response:
{completion}

Grade the response from 1 (worst) to {top} (best). Answer with the number alone.
Grade:"""


def judge(
    context: dict, id_or_url: str, rubric: str = DEFAULT_RUBRIC, top: int = 5, **http
) -> Callable:
    """A grade by a language model that reads a rubric, mapped from 1..top to 0..1.

    A local model (folder or hub id) gives the expected grade over the digit tokens. An
    `http(s)://.../v1` endpoint that speaks OpenAI's chat API (vLLM, Ollama, llama.cpp) is asked for
    a number; `http` are the arguments of `endpoint.grader`: model, key_env, timeout, retries,
    max_tokens. A text that got no grade has NO score: it is left out of the update and counted,
    never scored as 0. Raises UserError.
    """
    if not isinstance(top, int) or not 2 <= top <= 9:
        raise UserError(
            f"judge(top={top!r}): expected a whole number from 2 to 9, so that a grade is one digit"
        )
    if id_or_url.startswith(("http://", "https://")):
        ask = grader(id_or_url, top, **http)
    elif http:
        raise UserError(
            f"judge({id_or_url!r}) is a model on this machine; only a judge at http://... "
            f"takes {', '.join(http)}"
        )
    else:
        ask = _local(context, id_or_url, top)

    def reward(prompts, completions, **columns):
        questions = [
            QUESTION.format(rubric=rubric, prompt=p, completion=c, top=top)
            for p, c in zip(prompts, completions, strict=True)
        ]
        return [None if grade is None else (grade - 1) / (top - 1) for grade in ask(questions)]

    return reward


def _local(context: dict, id: str, top: int) -> Callable[[list[str]], list[float]]:
    """Expected grade under the next-token distribution restricted to the digits 1..top."""
    lm, tokenizer = frozen_lm(context, "judge", id)
    digits = [_digit_tokens(tokenizer, digit, id) for digit in range(1, top + 1)]

    @torch.no_grad()
    def ask(questions: list[str]) -> list[float]:
        grades = []
        for question in questions:  # one at a time: questions are long and of unequal length
            if tokenizer.chat_template:
                messages = [{"role": "user", "content": question}]
                # A template that knows no thinking ignores the last one.
                options = dict(tokenize=False, add_generation_prompt=True, enable_thinking=False)
                question = tokenizer.apply_chat_template(messages, **options)
            ids = tokenizer(question, add_special_tokens=not tokenizer.chat_template).input_ids
            ids = torch.tensor([ids[-context_of(lm) :]], device=next(lm.parameters()).device)
            logits = lm(input_ids=ids).logits[0, -1].float()  # (V,)
            by_digit = torch.stack([logits[variants].logsumexp(0) for variants in digits])  # (top,)
            grades.append(float((by_digit.softmax(0).cpu() * torch.arange(1, top + 1)).sum()))
        return grades

    return ask


def _digit_tokens(tokenizer, digit: int, id: str) -> list[int]:
    """The tokens of a digit: it may be one with and one without a space before it."""
    variants = set()
    for text in (str(digit), f" {digit}"):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(ids) <= 2:  # some tokenizers give the space a token of its own
            variants.add(ids[-1])
    variants = [i for i in variants if tokenizer.decode([i]).strip() == str(digit)]
    if not variants:
        raise UserError(f"judge({id!r}): the model's tokenizer has no token for the digit {digit}")
    return variants


# ------------------------------------------------------------------ COMET, helpers, the table


def comet(context: dict, id: str) -> Callable:
    """COMET (Rei et al. 2020): the prompt is the source, the target is the reference."""
    try:
        from comet import download_model, load_from_checkpoint
    except ImportError:
        message = "comet(...) needs the package unbabel-comet: pip install unbabel-comet"
        raise UserError(message) from None
    model = load_from_checkpoint(id if id.endswith(".ckpt") else download_model(id))
    gpus = int(str(context.get("device", "cpu")).startswith("cuda"))

    def reward(prompts, completions, **columns):
        texts = zip(prompts, completions, _targets(columns, "comet"), strict=True)
        data = [{"src": p, "mt": c, "ref": t} for p, c, t in texts]
        return list(model.predict(data, batch_size=BATCH_SIZE, gpus=gpus).scores)

    return reward


def _plain_batch(tokenizer, model, texts: list[str]) -> dict[str, torch.Tensor]:
    """Right-padded ids, (b, T) each, for a causal LM whose tokenizer may have no pad token."""
    filler = tokenizer.eos_token_id
    rows = [tokenizer(text).input_ids[-context_of(model) :] or [filler] for text in texts]
    width = max(len(row) for row in rows)
    device = next(model.parameters()).device
    ids = [row + [filler] * (width - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def _targets(columns: dict, name: str) -> list[str]:
    if "target" not in columns:
        raise UserError(
            f"reward '{name}' compares with a reference text, but the data has no target"
        )
    return columns["target"]


def _filled(template: str, prompts: list[str], columns: dict) -> list[str]:
    texts = []
    try:
        for i, prompt in enumerate(prompts):
            fields = {name: values[i] for name, values in columns.items()}
            texts.append(template.format(**{**fields, "prompt": prompt}))
    except (KeyError, IndexError) as problem:
        raise UserError(
            f"gptscore: the template {template!r} asks for {problem}, which is no field of the data"
        ) from None
    return texts


# name -> (make(context, **arguments) -> reward function, "range, needs: meaning")
JUDGES: dict[str, tuple[Callable, str]] = {
    "perplexity": (perplexity_reward, "0..1, model= or starting model: 1 / perplexity; 0 if empty"),
    "classifier": (classifier, "0..1, id, label=: probability that a classifier gives the label"),
    "model": (
        reward_model,
        "any, id, pair=: reward model, read as it was trained: chat template, pair, text",
    ),
    "cosine_sts": (
        cosine_sts,
        "-1..1, target, id (sentence-transformers) or the starting model: cosine",
    ),
    "nli": (nli, "-1..1, target, id: entailed by the target minus contradicting it"),
    "gptscore": (gptscore, "nats, id or the starting model, template=: mean log-probability"),
    "judge": (judge, "0..1, id or http://.../v1, rubric=: grade by a language model, or no score"),
    "bleurt": (bleurt, "any, target, id: a BLEURT checkpoint"),
    "comet": (comet, "about 0..1, target, id: COMET through unbabel-comet"),
}
