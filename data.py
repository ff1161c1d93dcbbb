"""Examples in, batches out: token ids, the one layout, the split, and a stream that can be resumed.

    row             prompt ids + response ids (+ EOS), right padded
    attention_mask  1 for real tokens
    response_mask   1 for the tokens that the model is responsible for

Prompt and response are tokenised apart and their ids joined, for SFT and PPO alike, so that no
token belongs to both. Masks come from lengths, never from `ids != pad`: EOS is trained even when it
is also the pad token. Where examples come from is in sources.py.
Left out on purpose: joining examples into blocks of one length (the model packs short rows itself,
lm.py), workers (tokenising is not the bottleneck at this size).

    python data.py reviews        # print some examples of a source
"""

import hashlib
import json
import random
import sys
from dataclasses import dataclass, fields

import jinja2  # comes with torch; chat templates are written in it
import torch

from engine import Parser, UserError, one_line_errors
from reviews import BLAME, PRAISE, is_fluent_review, review_metrics  # noqa: F401  (as below)
from sources import (  # noqa: F401  (what `from data import ...` offers, wherever it is written)
    Example,
    Pair,
    add_data_flags,
    data_options,
    load_examples,
    load_pairs,
    make_reviews,
    plain_reply,
    read_records,
    render_dialogue,
    review_pairs,
    to_examples,
)

SPACE = "\u2581"  # how SentencePiece-like tokenizers write the space that starts a word


# --------------------------------------------------------------------------------------- the layout


@dataclass
class Batch:
    """Rows of prompt + response, right padded. Each (B, T), indexed by the token it is about."""

    input_ids: torch.Tensor  # (B, T) long
    attention_mask: torch.Tensor  # (B, T) bool, True for real tokens
    response_mask: torch.Tensor  # (B, T) bool, True where the model is responsible for the token

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, index: torch.Tensor) -> "Batch":
        """The rows named by index (n,), without the columns that are padding in all of them."""
        width = int(self.attention_mask[index].sum(1).max())
        return type(self)(**{f.name: getattr(self, f.name)[index, :width] for f in fields(self)})

    def weight(self, index: torch.Tensor) -> torch.Tensor:
        """What a mean over these rows is taken over, a scalar: their response tokens."""
        return self.response_mask[index].sum()

    def lengths(self) -> torch.Tensor:
        """Tokens of each row, (B,)."""
        return self.attention_mask.sum(1)

    def to(self, device: torch.device) -> "Batch":
        return type(self)(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def make_batch(
    tokenizer, prompts: list[list[int]], responses: list[list[int]], max_length: int
) -> Batch:
    """Join prompt and response ids into a Batch of at most `max_length` columns.

    A row that is too long loses the oldest tokens of its prompt first; only if one prompt token and
    the response still do not fit does the response lose its end, EOS included. Nothing is added: a
    caller that wants EOS trained puts it into the response. Raises ValueError for a max_length
    below 2, an empty prompt (nothing would predict the first response token), an empty response.

    >>> batch = make_batch(None, [[1, 2, 3], [4]], [[5, 6], [7]], max_length=4)
    >>> batch.input_ids.tolist(), batch.response_mask.int().tolist()
    ([[2, 3, 5, 6], [4, 7, 0, 0]], [[0, 0, 1, 1], [0, 1, 0, 0]])
    """
    if max_length < 2:
        needed = "a row needs a prompt token and a response token"
        raise ValueError(f"max_length is {max_length}, but {needed}")
    rows, masks = [], []
    for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        if not prompt or not response:
            raise ValueError(f"row {i} has an empty {'response' if prompt else 'prompt'}")
        response = response[: max_length - 1]
        prompt = prompt[-(max_length - len(response)) :]
        rows.append(prompt + response)
        masks.append([False] * len(prompt) + [True] * len(response))
    return batch_of(tokenizer, rows, masks)


def batch_of(tokenizer, rows: list[list[int]], masks: list[list[bool]]) -> Batch:
    """Rows of token ids, and for each token whether the model is responsible for it -> a Batch."""
    lengths = torch.tensor([len(row) for row in rows])  # (B,)
    width = int(lengths.max())
    filler = pad_id(tokenizer)
    input_ids = torch.tensor([row + [filler] * (width - len(row)) for row in rows])  # (B, T)
    column = torch.arange(width)[None]  # (1, T)
    attention_mask = column < lengths[:, None]  # (B, T)
    response_mask = torch.tensor([mask + [False] * (width - len(mask)) for mask in masks])  # (B, T)
    return Batch(input_ids, attention_mask, response_mask)


def pad_id(tokenizer) -> int:
    """The pad token, else EOS, else 0: any id will do, since masks say what is padding, not ids."""
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return getattr(tokenizer, name)
    return 0


# -------------------------------------------------------------------------------------- text to ids


def encode_prompt(tokenizer, example: Example) -> list[int]:
    """Token ids of the prompt, with the BOS that the tokenizer wants, exactly once. Never empty.

    A dialogue goes through the tokenizer's own chat template if it has one; otherwise
    `example.prompt` already holds the plain rendering of `render_dialogue`. Raises UserError where
    the template refuses the dialogue.
    """
    if example.messages is not None and tokenizer.chat_template:
        text = _chat_prompt(tokenizer, example)
        ids = tokenizer(text, add_special_tokens=False).input_ids  # the template has written BOS
    else:
        text, bos = example.prompt, tokenizer.bos_token
        has_bos = bos is not None and text.startswith(bos)
        ids = tokenizer(text, add_special_tokens=not has_bos).input_ids
        if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
            if not text.endswith(tokenizer.eos_token):
                ids = ids[:-1]  # some tokenizers add EOS to every text; here a response follows
    if ids:
        return ids
    # Even an empty prompt needs a token from which the first response token is predicted.
    has_bos_id = tokenizer.bos_token_id is not None
    return [tokenizer.bos_token_id if has_bos_id else tokenizer.eos_token_id]


def _chat_prompt(tokenizer, example: Example) -> str:
    messages = example.messages
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except jinja2.TemplateError as problem:
        dialogue = f"the dialogue {example.prompt[:80]!r}"
        raise UserError(f"the model's chat template refuses {dialogue}: {problem}") from None


def encode_target(tokenizer, text: str) -> list[int]:
    """Token ids of a complete response, EOS at the end.

    SentencePiece-like tokenizers put a space before every text; if the text begins with a space
    too, one of the two is removed.
    """
    if text.startswith(" ") and tokenizer.tokenize("a")[0].startswith(SPACE):
        text = text[1:]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return ids if ids[-1:] == [tokenizer.eos_token_id] else ids + [tokenizer.eos_token_id]


def decode(tokenizer, response: list[int]) -> str:
    """Text of a response, for rewards and for people. Training uses the ids."""
    text = tokenizer.decode(response, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if response and not text.startswith(" "):
        # Decoders remove the space before the first word, as at the beginning of a text.
        if tokenizer.convert_ids_to_tokens(response[0]).startswith(SPACE):
            return " " + text
    return text


def demonstration_batch(tokenizer, examples: list[Example], max_length: int) -> Batch:
    """Prompts and targets of the examples as one Batch, for an SFT step or the held-out NLL."""
    prompts = [encode_prompt(tokenizer, example) for example in examples]
    targets = [encode_target(tokenizer, example.target) for example in examples]
    return make_batch(tokenizer, prompts, targets, max_length)


def columns_of(examples: list[Example]) -> dict[str, list]:
    """The keyword lists that rewards receive: `target` and every other field of the data.

    A field that an example lacks is None. Fields named `prompts` and `completions` are left out:
    rewards use these names for something else.
    """
    names = dict.fromkeys(name for example in examples for name in example.columns)  # in order
    lists = {name: [example.columns.get(name) for example in examples] for name in names}
    lists.pop("prompts", None)
    lists.pop("completions", None)
    return {**lists, "target": [example.target for example in examples]}


# --------------------------------------------------------------------------------- split and stream


def split_examples(
    examples: list[Example], holdout: float = 0.1
) -> tuple[list[Example], list[Example]]:
    """(train, held out) by a hash of the record: it depends neither on order nor on other records.

    All turns of a dialogue are on one side. If a side would be empty, the record with the smallest
    hash is held out; a single record (or dialogue) serves on both sides.
    """
    hashes = [_hash(example) for example in examples]
    limit = holdout
    if not min(hashes) < holdout <= max(hashes):  # one side would be empty
        limit = min(hashes) + 1e-12
    train = [example for example, h in zip(examples, hashes) if h >= limit]
    held_out = [example for example, h in zip(examples, hashes) if h < limit]
    return train or held_out, held_out


def _hash(example: Example) -> float:
    """A number in [0, 1). A dialogue is hashed by its first user turn: many share a system turn."""
    key = [example.prompt, example.target]
    if example.messages is not None:
        key = [m for m in example.messages if m["role"] == "user"][:1] or key
    text = json.dumps(key, ensure_ascii=False, default=str)
    digest = hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


class BatchStream:
    """Endless batches of items, in a new order every epoch. Each item is drawn once an epoch.

    No remainder is dropped. Its position is two numbers (`state_dict`), since the order of every
    epoch follows from `seed` and the epoch.
    """

    def __init__(self, items: list, batch_size: int, seed: int):
        self.items, self.batch_size, self.seed = items, batch_size, seed
        self.epoch, self.index = 0, 0
        self._order = self._shuffle()

    def _shuffle(self) -> list[int]:
        order = list(range(len(self.items)))
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return order

    def next(self) -> list:
        """The next `batch_size` items. They may be of two epochs; a small source repeats some."""
        batch = []
        while len(batch) < self.batch_size:
            if self.index == len(self._order):
                self.epoch, self.index = self.epoch + 1, 0
                self._order = self._shuffle()
            batch.append(self.items[self._order[self.index]])
            self.index += 1
        return batch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.index = state["epoch"], state["index"]
        self._order = self._shuffle()


# -------------------------------------------------------------------------------------- the command


def touches(example: Example) -> bool:
    """Does the target begin with a letter or digit directly after the last word of the prompt?"""
    if example.messages is not None:
        return False
    last, first = example.prompt[-1:], example.target[:1]
    return bool(last.strip()) and first.isascii() and first.isalnum()


@one_line_errors
def main(argv: list[str]) -> None:
    """What a source becomes: its first examples, and how many there are."""
    parser = Parser(main.__doc__)
    source_help = "what --data of train.py may be; the flags are those of train.py too"
    parser.add_argument("source", nargs="?", default="reviews", help=source_help)
    add_data_flags(parser)
    args = parser.parse_args(argv)
    examples = load_examples(args.source, **data_options(args))
    for example in examples[:3]:
        record = {"prompt": example.prompt, "target": example.target, **example.columns}
        print(json.dumps(record, ensure_ascii=False, default=str))
    _, held_out = split_examples(examples)
    n_empty = len([example for example in examples if not example.target])
    print(f"{len(examples)} examples, {len(held_out)} of them held out, {n_empty} without a target")
    touching = [example for example in examples if touches(example)]
    if touching:
        text = (touching[0].prompt + touching[0].target)[:60]
        print(
            f"note: in {len(touching)} of them prompt and target touch, as in {text!r}: "
            "end one or begin the other with a space or line break"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
