"""Examples in, batches out: token ids, the one layout, the split, and a stream that can be resumed.

    row             prompt ids + response ids (+ EOS), right padded
    attention_mask  1 for real tokens
    response_mask   1 for the tokens of responses, which are trained

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

import torch

import survey
from chat import cut_prompt, encode_demonstration, end_ids, room_for_prompt
from chat import decode as decode  # these three can be had from here too
from chat import encode_prompt as encode_prompt
from chat import encode_target as encode_target
from engine import Parser, UserError, number, one_line_errors
from lm import context_of_config, load_tokenizer
from reviews import BLAME, PRAISE, is_fluent_review, review_metrics  # noqa: F401  (as below)
from sources import (  # noqa: F401  (what `from data import ...` offers, wherever it is written)
    Example,
    Pair,
    add_data_flags,
    data_options,
    load_examples,
    load_pairs,
    load_prompts,
    make_reviews,
    pair_options,
    plain_reply,
    read_records,
    render_dialogue,
    review_pairs,
    to_examples,
    with_all_columns,
)

# --------------------------------------------------------------------------------------- the layout


@dataclass
class Batch:
    """Rows of prompt + response, right padded. Each (B, T), indexed by the token it is about."""

    input_ids: torch.Tensor  # (B, T) long
    attention_mask: torch.Tensor  # (B, T) bool, True for real tokens
    response_mask: torch.Tensor  # (B, T) bool, True for tokens of responses: they are trained

    def __len__(self) -> int:
        return len(self.input_ids)

    def rows(self, index: torch.Tensor) -> "Batch":
        """The rows named by index (n,), without the columns that are padding in all of them."""
        width = int(self.attention_mask[index].sum(1).max())
        return type(self)(**{f.name: getattr(self, f.name)[index, :width] for f in fields(self)})

    def weight(self, index: torch.Tensor) -> torch.Tensor:
        """The divisor of a mean over these rows, a scalar: the number of their response tokens."""
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
    """Rows of token ids, and for each token whether it is of a response -> a Batch."""
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


# ------------------------------------------------------------------------------------- text to rows


def demonstration_batch(
    tokenizer, examples: list[Example], max_length: int, max_prompt_length: int | None = None
) -> Batch:
    """Prompts and answers of the examples as one Batch, for an SFT step or the held-out NLL.

    A prompt is cut on its left to `max_prompt_length`. An answer is cut on its right to the room
    that remains; an answer that was cut has no EOS. With None, the prompt leaves the answer the
    room that it needs, but at most half of the row.
    """
    ends, prompts, answers = end_ids(tokenizer), [], []
    for example in examples:
        prompt, answer = encode_demonstration(tokenizer, example, max_prompt_length, ends)
        if max_prompt_length is None:
            room = room_for_prompt(max_length, len(answer))
            prompt = cut_prompt(tokenizer, example, prompt, room)
        prompts.append(prompt)
        answers.append(answer[: max_length - len(prompt)])
    return make_batch(tokenizer, prompts, answers, max_length)


def columns_of(examples: list[Example]) -> dict[str, list]:
    """The keyword lists that rewards receive: `target` and every other field of the data.

    A field that an example lacks is None. Fields named `prompts` and `completions` are left out:
    rewards use these names for something else. `prompt_messages` are the prompts of dialogues.
    """
    records = [example.named | example.columns for example in examples]
    names = dict.fromkeys(name for record in records for name in record)  # in order
    lists = {name: [record.get(name) for record in records] for name in names}
    lists.pop("prompts", None)
    lists.pop("completions", None)
    # Targets of --prompts are for rewards alone: they are in the field, not in the example.
    targets = [example.target or example.columns.get("target") or "" for example in examples]
    lists["target"] = targets
    if any(example.messages for example in examples):
        lists["prompt_messages"] = [example.messages for example in examples]
    return lists


# --------------------------------------------------------------------------------- split and stream


def split_examples(
    examples: list[Example], holdout: float = 0.1
) -> tuple[list[Example], list[Example]]:
    """(train, held out), by a hash of the prompt: the order does not matter. No prompt is on both.

    All turns of a dialogue are on one side. Two dialogues that only begin alike ("Hi") may be on
    different sides; the prompt that both have is then in train alone. If a side would be empty, the
    prompt with the smallest hash is held out. If there is only one prompt, records are split by
    their target too; a single record is on both sides.
    """
    keys = [_key(example) for example in examples]
    if len(set(keys)) == 1:  # nothing else tells the records apart
        keys = [f"{key} {example.target}" for key, example in zip(keys, examples)]
    hashes = [_hash(key) for key in keys]
    limit = holdout
    if not min(hashes) < holdout <= max(hashes):  # one side would be empty
        limit = min(hashes) + 1e-12
    train = [example for example, h in zip(examples, hashes) if h >= limit]
    held_out = [example for example, h in zip(examples, hashes) if h < limit]
    seen = {example.prompt for example in train}
    new = [example for example in held_out if example.prompt not in seen]
    return train or held_out, new or held_out


def _key(example: Example) -> str:
    """What the user says, and the system turn: the same for every turn of a dialogue."""
    if example.messages is None:
        return json.dumps([example.prompt])
    said = [m["content"] for m in example.messages if m["role"] in ("system", "user")]
    return json.dumps(said + list(example.user_turns))


def _hash(key: str) -> float:
    """A number in [0, 1)."""
    digest = hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def split_pairs(pairs: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """(train, held out) preference pairs, by the prompt, as `split_examples` does it."""
    examples = []
    for pair in pairs:
        both = f"{pair.chosen}\0{pair.rejected}"
        examples.append(Example(pair.prompt, both, {"pair": pair}, pair.messages))
    train, held_out = split_examples(examples)
    return [e.columns["pair"] for e in train], [e.columns["pair"] for e in held_out]


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


@one_line_errors
def main(argv: list[str]) -> None:
    """What a source becomes: three examples, as text or as a model reads them, and counts."""
    parser = Parser(main.__doc__)
    add, count = parser.add_argument, number(int, 2)
    source_help = "what --data of train.py may be; the flags are those of train.py too"
    add("source", nargs="*", default=["reviews"], help=source_help)
    add("--model", help="show the text as this model reads it (a folder or hub id)")
    what = "tokens of prompt and response together (default: 1024, or the model's context)"
    add("--max-length", type=count, help=what)
    add("--max-new-tokens", type=count, default=32, help="of them, room for the response at least")
    add_data_flags(parser)
    args = parser.parse_args(argv)
    examples = load_examples(args.source, **data_options(args))
    if args.model is None:
        for example in examples[:3]:
            record = {"prompt": example.prompt, "target": example.target}
            record = {**example.columns, **record}
            print(json.dumps(record, ensure_ascii=False, default=str))
    else:
        examples = show_as_read(args, examples)
    train, held_out = split_examples(examples)
    n_empty = len([example for example in examples if not example.target])
    print(f"{len(examples)} examples, {len(held_out)} of them held out, {n_empty} without a target")
    survey.say_shared(train, held_out, print)
    if args.model is None:
        survey.say_touching(examples, print)


def show_as_read(args, examples: list[Example]) -> list[Example]:
    """Print three rows as the model of --model reads them. -> the examples that it can read."""
    tokenizer = load_tokenizer(args.model, "--model")
    max_length = args.max_length or min(1024, context_of_config(args.model))
    if args.max_new_tokens >= max_length:
        raise UserError(f"--max-new-tokens {args.max_new_tokens} leaves no room for a prompt")
    limits = dict(max_length=max_length, max_prompt_length=max_length - args.max_new_tokens)
    examples = survey.writable(tokenizer, examples, args.strict, print)
    for example in examples[:3]:
        print(survey.show(tokenizer, example, **limits))
    survey.say_read(tokenizer, examples, limits, print)
    return examples


if __name__ == "__main__":
    main(sys.argv[1:])
