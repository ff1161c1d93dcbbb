"""Sequence classifiers of Hugging Face, and how a reward model reads a prompt and an answer.

    chat    its chat template writes the dialogue, answer included; the text is read as it is
    pair    tokenizer(prompt, answer): two texts with a separator, for encoders
    text    prompt + answer as one text

`Scorer` turns prompts and answers into a batch, for `--reward model(...)` and for reward_model.py
alike: what is trained is what is scored. A decoder is read at the token at which Hugging Face reads
it. Left out on purpose: `tools` of a dialogue, models whose code comes from the hub.

    python -m pytest -q tests/test_reward_models.py       # against Hugging Face's own forward
"""

from dataclasses import dataclass

import torch
from transformers import AutoModel, AutoTokenizer

from chat import MARK, render, reply_of
from engine import UserError, first_line
from lm import UNLOADABLE, WITH_REPORT, check_no_adapter, check_weights, context_of
from messages import render_dialogue
from records import Example

BATCH_SIZE = 16  # texts that a model reads together
MAX_LENGTH = 4096  # tokens; a longer text loses its beginning, so the end is always read
CHAT, PAIR, TEXT = "chat", "pair", "text"
HOW = {CHAT: "through its chat template", PAIR: "as a pair of texts", TEXT: "as one text"}

# ------------------------------------------------------------------ load, tokenise, run


def load_judge(auto_class, name: str, device, subfolder: str = "") -> tuple:
    """A frozen model and its own tokenizer from a folder or hub id. Raises UserError."""
    check_no_adapter(f"reward model {name}", name)
    try:
        model, report = auto_class.from_pretrained(name, subfolder=subfolder, **WITH_REPORT)
        tokenizer = AutoTokenizer.from_pretrained(name, subfolder=subfolder)
    except UNLOADABLE as problem:
        raise UserError(
            f"reward model {name} cannot be loaded ({first_line(problem)}); "
            "give a folder, or a hub id and a network"
        ) from None
    # A body is read from any model, and nobody asks its pooler, which is all its head.
    is_body = auto_class is AutoModel
    check_weights(f"reward model {name}", model, report, other_head=True, new_head=is_body)
    prepare_tokenizer(tokenizer)
    return model.to(device or "cpu").eval().requires_grad_(False), tokenizer


def prepare_tokenizer(tokenizer) -> None:
    """A pad token, and the sides on which texts are cut and padded."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # the mask hides it
    tokenizer.truncation_side, tokenizer.padding_side = "left", "right"


def longest_text(tokenizer, model) -> int:
    """Tokens of one text that both can read."""
    room = context_of(model)
    for module in model.modules():  # RoBERTa and its like count positions from padding_idx + 1
        is_counted = isinstance(getattr(module, "position_embeddings", None), torch.nn.Embedding)
        if is_counted and isinstance(getattr(module, "padding_idx", None), int):
            room -= module.padding_idx + 1
    return min(room, tokenizer.model_max_length)


def tokenize(
    tokenizer,
    model,
    texts: list[str],
    pairs: list[str] | None = None,
    *,
    special_tokens: bool = True,
    max_length: int = MAX_LENGTH,
) -> dict[str, torch.Tensor]:
    """One padded batch on the model's device, (b, T) each. A text without tokens is read as one
    EOS (or pad) token. Without `special_tokens`, the texts hold all that the model needs."""
    limit = min(max_length, longest_text(tokenizer, model))
    options = dict(truncation=True, max_length=limit, padding=True)
    options["add_special_tokens"] = special_tokens
    inputs = tokenizer(texts, pairs, return_tensors="pt", **options)
    if inputs["input_ids"].shape[1] == 0:  # every text of the batch is empty
        fillers = [tokenizer.pad_token] * len(texts)
        inputs = tokenizer(fillers, return_tensors="pt", add_special_tokens=False)
    inputs["attention_mask"][inputs["attention_mask"].sum(1) == 0, 0] = 1
    bos = tokenizer.bos_token
    if bos is not None and not special_tokens:
        # A cut takes the beginning. BOS, which every text of such a model begins with, stays.
        begins_with_bos = torch.tensor([text.startswith(bos) for text in texts])  # (b,)
        inputs["input_ids"][begins_with_bos, 0] = tokenizer.bos_token_id
    return {name: value.to(next(model.parameters()).device) for name, value in inputs.items()}


def sequence_logits(
    model, input_ids: torch.Tensor, attention_mask: torch.Tensor, **inputs
) -> torch.Tensor:
    """Class logits of a sequence classifier, (b, T) -> (b, C), as Hugging Face gives them for each
    row alone.

    Encoders are read at their first token; decoders at the last token that is not the pad token of
    the config, or at the last one where the config names none. The padding of the batch may be
    another token: the mask hides it.
    """
    if not hasattr(model, "score"):
        return model(input_ids=input_ids, attention_mask=attention_mask, **inputs).logits.float()
    outputs = model.base_model(input_ids=input_ids, attention_mask=attention_mask)
    hidden = outputs.last_hidden_state  # (b, T, H)
    is_read = attention_mask.bool()  # (b, T)
    pad = model.config.get_text_config().pad_token_id
    if pad is not None:
        is_read = is_read & (input_ids != pad)
    column = torch.arange(input_ids.shape[1], device=input_ids.device)  # (T,)
    last = torch.where(is_read, column, 0).max(1).values  # (b,)
    return model.score(hidden[torch.arange(len(hidden), device=hidden.device), last]).float()


@torch.no_grad()
def batched_logits(
    model, tokenizer, texts: list[str], pairs: list[str] | None = None
) -> torch.Tensor:
    """(N, C) logits on the CPU, BATCH_SIZE texts at a time; `pairs` are second texts, if any."""
    logits = []
    for i in range(0, len(texts), BATCH_SIZE):
        second_texts = pairs[i : i + BATCH_SIZE] if pairs else None
        batch = tokenize(tokenizer, model, texts[i : i + BATCH_SIZE], second_texts)
        logits.append(sequence_logits(model, **batch).cpu())
    return torch.cat(logits)


# ------------------------------------------------------------------ a prompt and an answer


def input_form(name: str, model, tokenizer, pair: bool | None = None) -> str:
    """The form in which a reward model reads a prompt and an answer: chat, pair or text.

    `pair` decides, if it is given; else the config's `reward_input`, which reward_model.py writes;
    else the chat template, if there is one. An encoder without a template, whose tokenizer can
    separate two texts, reads a pair. Raises UserError, naming the model, for what cannot be.
    """
    form = getattr(model.config, "reward_input", None)
    if form is None and hasattr(model.config, "reward_mean"):
        form = TEXT  # of a reward_model.py that knew no other form
    if pair:
        form = PAIR
    elif form is None or (form == PAIR and pair is False):
        is_decoder = hasattr(model, "score")
        specials = [tokenizer.num_special_tokens_to_add(is_pair) for is_pair in (False, True)]
        reads_pairs = pair is None and not is_decoder and specials[0] < specials[1]
        form = CHAT if tokenizer.chat_template else PAIR if reads_pairs else TEXT
    if form not in HOW:
        known = ", ".join(HOW)
        raise UserError(f"{name}: its config says reward_input {form!r}; known are {known}")
    if form == CHAT:
        check_template(name, tokenizer)
    return form


def check_template(name: str, tokenizer) -> None:
    """Raises UserError, naming the model, unless its chat template writes a question and its
    answer."""
    if not tokenizer.chat_template:
        raise UserError(f"{name}: its config says reward_input 'chat', but it has no chat template")
    asked = [{"role": "user", "content": "question"}, {"role": "assistant", "content": MARK}]
    try:
        text = render(tokenizer, asked)
    except UserError as problem:
        raise UserError(f"{name}: its chat template refuses a question: {problem}") from None
    if MARK not in text:
        raise UserError(f"{name}: its chat template does not write the answer")


@dataclass(frozen=True)
class Scorer:
    """A reward model that reads prompts and answers in one form.

    Both are strings if the form is text, else lists of messages {role, content}. `name` is what
    errors call the model.
    """

    name: str
    model: torch.nn.Module
    tokenizer: object
    form: str

    def batch(self, prompts: list, answers: list) -> dict[str, torch.Tensor]:
        """The token ids of each prompt with its answer, (b, T), and what else the model gets.

        Raises UserError, naming the model, where its chat template refuses a dialogue.
        """
        if self.form == PAIR:
            texts = [_one_text(messages, "user") for messages in prompts]
            pairs = [_one_text(messages, "assistant") for messages in answers]
            return tokenize(self.tokenizer, self.model, texts, pairs)
        texts = [self.text(*both) for both in zip(prompts, answers, strict=True)]
        # A template writes BOS and the end of the turn itself.
        return tokenize(self.tokenizer, self.model, texts, special_tokens=self.form != CHAT)

    def text(self, prompt: str | list[dict], answer: str | list[dict]) -> str:
        """What a model of the form chat or text reads. Raises UserError as `batch` does."""
        if self.form == TEXT:
            return prompt + answer
        try:
            return render(self.tokenizer, [*prompt, *answer])
        except UserError as problem:
            said = _one_text(prompt, "user")[:80]
            refused = f"its chat template refuses the dialogue {said!r}: {problem}"
            raise UserError(f"{self.name}: {refused}") from None

    def parts(self, example: Example) -> tuple:
        """The prompt and the answer of an example, as `batch` wants them."""
        if self.form == TEXT:
            return example.prompt, example.target
        prompt = example.messages or [{"role": "user", "content": example.prompt}]
        return prompt, [reply_of(example)]

    @torch.no_grad()
    def scores(self, prompts: list, answers: list) -> torch.Tensor:
        """Raw scores (N,) on the CPU, BATCH_SIZE answers at a time."""
        scores = []
        for i in range(0, len(prompts), BATCH_SIZE):
            batch = self.batch(prompts[i : i + BATCH_SIZE], answers[i : i + BATCH_SIZE])
            scores.append(sequence_logits(self.model, **batch)[:, 0].cpu())
        return torch.cat(scores)


def _one_text(messages: list[dict], role: str) -> str:
    """What the only message of that role says; other dialogues by the plain template."""
    if [message["role"] for message in messages] == [role]:
        return messages[0]["content"]
    text = render_dialogue(messages).removesuffix("\n\nAssistant:\n")
    return text.removeprefix("Assistant:\n")
