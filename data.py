"""Examples in, batches out: files, hub datasets or the built-in task; token ids; the one layout; a stream that can be resumed.

    row             prompt ids + response ids (+ EOS), right padded
    attention_mask  1 for real tokens        response_mask   1 for the tokens that the model is responsible for

Prompt and response are tokenised apart and their ids joined, for SFT and PPO alike, so that no merge ever crosses the
border. Masks come from lengths, never from `ids != pad`: EOS is trained even when it doubles as the pad token.
Left out on purpose: joining examples into blocks of one length (the model packs short rows by itself: `HybridModel.states_before`), streaming of endless corpora, workers (tokenising is not the bottleneck at this size).

    python data.py reviews        # print some examples of a source
"""

import csv
import hashlib
import itertools
import json
import logging
import random
import re
import sys
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import jinja2  # comes with torch; chat templates are written in it
import torch

from engine import Parser, UserError, first_line, number, one_line_errors

PROMPT_FIELDS = ("prompt", "instruction", "question", "query")
TARGET_FIELDS = ("target", "completion", "response", "output", "answer")
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}
SPACE = "\u2581"  # how SentencePiece-like tokenizers write the space that starts a word
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Example:
    """One training example. `columns` are the record's other fields; rewards receive them by name.

    `messages` is set where the prompt is the history of a dialogue: a list of {role, content}; `user_turns` is what its user says next.
    An empty `target` means that there is none: the example serves PPO alone.
    """

    prompt: str
    target: str
    columns: dict = field(default_factory=dict)
    messages: list[dict] | None = None
    user_turns: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------ the layout


@dataclass
class Batch:
    """Rows of prompt + response, right padded. Everything is (B, T) and indexed by the token it is about."""

    input_ids: torch.Tensor  # (B, T) long
    attention_mask: torch.Tensor  # (B, T) bool, True for real tokens
    response_mask: (
        torch.Tensor
    )  # (B, T) bool, True for the tokens that the model is responsible for

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

    A row that is too long loses the oldest tokens of its prompt first; only if one prompt token and the response still do not
    fit does the response lose its end, EOS included. Nothing is added: a caller that wants EOS trained puts it into the response.
    Raises ValueError for an empty prompt (nothing would predict the first response token) or an empty response.

    >>> batch = make_batch(None, [[1, 2, 3], [4]], [[5, 6], [7]], max_length=4)
    >>> batch.input_ids.tolist(), batch.response_mask.int().tolist()
    ([[2, 3, 5, 6], [4, 7, 0, 0]], [[0, 0, 1, 1], [0, 1, 0, 0]])
    """
    if max_length < 2:
        raise ValueError(
            f"max_length is {max_length}, but a row needs a prompt token and a response token"
        )
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
    """Rows of token ids and, for each token, whether the model is responsible for it -> a Batch, right padded."""
    lengths = torch.tensor([len(row) for row in rows])  # (B,)
    width = int(lengths.max())
    filler = pad_id(tokenizer)
    input_ids = torch.tensor([row + [filler] * (width - len(row)) for row in rows])  # (B, T)
    column = torch.arange(width)[None]  # (1, T)
    attention_mask = column < lengths[:, None]  # (B, T)
    response_mask = torch.tensor([mask + [False] * (width - len(mask)) for mask in masks])  # (B, T)
    return Batch(input_ids, attention_mask, response_mask)


def pad_id(tokenizer) -> int:
    """Any legal id will do, since masks and not ids say what is padding: the pad token, else EOS, else 0."""
    for name in ("pad_token_id", "eos_token_id"):
        if getattr(tokenizer, name, None) is not None:
            return getattr(tokenizer, name)
    return 0


# ------------------------------------------------------------------------------------------------ text to ids


def encode_prompt(tokenizer, example: Example) -> list[int]:
    """Token ids of the prompt, with the BOS that the tokenizer wants, exactly once. Never empty.

    A dialogue goes through the tokenizer's own chat template if it has one; otherwise `example.prompt` already holds the plain
    rendering of `render_dialogue`. Raises UserError where the template refuses the dialogue.
    """
    text = example.prompt
    if example.messages is not None and tokenizer.chat_template:
        try:
            text = tokenizer.apply_chat_template(
                example.messages, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as problem:
            raise UserError(
                f"the model's chat template refuses the dialogue {example.prompt[:80]!r}: {problem}"
            ) from None
        ids = tokenizer(
            text, add_special_tokens=False
        ).input_ids  # the template has written BOS itself
    else:
        starts_with_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        ids = tokenizer(text, add_special_tokens=not starts_with_bos).input_ids
        if (
            ids
            and ids[-1] == tokenizer.eos_token_id
            and len(ids) > 1
            and not text.endswith(tokenizer.eos_token)
        ):
            ids = ids[:-1]  # some tokenizers close every text; a prompt is to be continued
    if not ids:  # an unconditional sample still needs a first token to be predicted from
        ids = [
            tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        ]
    return ids


def encode_target(tokenizer, text: str) -> list[int]:
    """Token ids of a complete response, EOS at the end.

    SentencePiece-like tokenizers put a space before whatever they are given; a text that brings its own loses one of the two.
    """
    if text.startswith(" ") and tokenizer.tokenize("a")[0].startswith(SPACE):
        text = text[1:]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return ids if ids[-1:] == [tokenizer.eos_token_id] else ids + [tokenizer.eos_token_id]


def decode(tokenizer, response: list[int]) -> str:
    """Text of a response for rewards and for people. Training never uses it: ids are kept from end to end."""
    text = tokenizer.decode(response, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    first = tokenizer.convert_ids_to_tokens(response[0]) if response else ""
    return (
        " " + text if first.startswith(SPACE) and not text.startswith(" ") else text
    )  # decoders strip it: "a text starts here"


def demonstration_batch(tokenizer, examples: list[Example], max_length: int) -> Batch:
    """Prompts and targets of the examples as one Batch: what an SFT step and the held-out NLL look at."""
    prompts = [encode_prompt(tokenizer, example) for example in examples]
    targets = [encode_target(tokenizer, example.target) for example in examples]
    return make_batch(tokenizer, prompts, targets, max_length)


def columns_of(examples: list[Example]) -> dict[str, list]:
    """The keyword lists that rewards receive: `target` and every other column of the data, None where a record lacks it."""
    names = {
        name: None for example in examples for name in example.columns
    }  # a dict keeps the order
    columns = {
        name: [example.columns.get(name) for example in examples]
        for name in names
        if name not in ("prompts", "completions")
    }
    return {**columns, "target": [example.target for example in examples]}


# ------------------------------------------------------------------------------------------------ sources


def load_examples(
    source: str,
    *,
    limit: int | None = None,
    prompt_field: str | None = None,
    target_field: str | None = None,
    prompt_words: int = 12,
    encoding: str = "utf-8",
    config: str | None = None,
    split: str = "train",
    seed: int = 0,
) -> list[Example]:
    """Examples from `reviews` (built in), a .jsonl / .json / .csv / .parquet / .txt file, or a hub dataset id.

    A record is one of: prompt + target (aliases above; Alpaca's instruction / input / output); `messages`, one example for
    every assistant turn, with its history as prompt; `turns`, what a user says in a dialogue that has no answers yet; `text`, whose first `prompt_words` words are the prompt. A .txt file has
    one record a line, or is cut at `<|endoftext|>` where it has that. At most `limit` records are read.
    Raises UserError naming file and line, or what else was wrong.
    """
    if source == "reviews":
        return make_reviews(limit or 4000, seed)
    examples, too_short = [], 0
    for number, record in enumerate(read_records(source, limit, encoding, config, split)):
        try:
            found = to_examples(record, prompt_field, target_field, prompt_words)
        except UserError as problem:
            raise UserError(f"{_where(source, number)}: {problem}") from None
        examples += found
        too_short += not found
    if too_short:
        print(
            f"note: {too_short} texts of {source} were left out, too short to be cut into prompt and target",
            file=sys.stderr,
        )
    if not examples:
        raise UserError(f"--data {source} holds no record that can be used")
    names = {
        name: None for example in examples for name in example.columns
    }  # every example has every column, so that a
    return [
        replace(e, columns={name: e.columns.get(name) for name in names}) for e in examples
    ]  # reward may count on them


def to_examples(
    record: dict,
    prompt_field: str | None = None,
    target_field: str | None = None,
    prompt_words: int = 12,
) -> list[Example]:
    """One record to its examples: several for a dialogue, none for a text of one word. Raises UserError that says what is missing or of the wrong type."""
    record = {
        name: value for name, value in record.items() if value is not None
    }  # readers fill absent fields with None
    if prompt_field is None and target_field is None:
        if "messages" in record:
            return _dialogue_examples(record)
        if "turns" in record:
            return _question_examples(record)
        if "text" in record and not any(name in record for name in TARGET_FIELDS):
            return _text_examples(record, prompt_words)
    prompt_field = _pick_field(record, prompt_field, PROMPT_FIELDS, "prompt")
    target_field = _pick_field(record, target_field, TARGET_FIELDS, "target")
    prompt, target = _string(record, prompt_field), _string(record, target_field)
    columns = {
        name: value for name, value in record.items() if name not in (prompt_field, target_field)
    }
    if prompt_field == "instruction" and record.get("input"):  # Alpaca
        prompt = f"{prompt}\n\n{_string(columns, 'input')}"
    if not target.strip():
        raise UserError(f"field '{target_field}' is empty, so there is nothing to learn from it")
    return [Example(prompt, target, columns)]


def render_dialogue(messages: list[dict]) -> str:
    """The plain template for models without one: `Role:`, a line break, the content, a blank line; then `Assistant:`."""
    turns = "".join(
        f"{message['role'].capitalize()}:\n{message['content']}\n\n" for message in messages
    )
    return turns + "Assistant:\n"


def plain_reply(said: str) -> str:
    """What the plain template puts after a response: its end, the user's turn, the header of the next response."""
    return "\n\n" + render_dialogue([{"role": "user", "content": said}])


def _dialogue_examples(record: dict) -> list[Example]:
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise UserError("field 'messages' must be a list of {role, content} objects")
    for message in messages:
        if message.get("role") not in ROLES:
            raise UserError(
                f"unknown role {message.get('role')!r} in 'messages' (known: {', '.join(ROLES)})"
            )
        _string(message, "content")
    turns = [
        i
        for i, message in enumerate(messages)
        if message["role"] == "assistant" and message["content"].strip()
    ]
    if not turns:
        raise UserError(
            "'messages' has no assistant turn with content, so there is nothing to learn from it"
        )
    columns = {name: value for name, value in record.items() if name != "messages"}
    return [
        Example(
            prompt=render_dialogue(messages[:i]),
            target=messages[i]["content"],
            columns=columns,
            messages=messages[:i],
            user_turns=tuple(m["content"] for m in messages[i + 1 :] if m["role"] == "user"),
        )
        for i in turns
    ]


def _question_examples(record: dict) -> list[Example]:
    """`turns`: what a user says, one string after the other (MT-bench); `reference`, if there is one, holds the answers."""
    turns = record["turns"]
    if (
        not isinstance(turns, list)
        or not turns
        or not all(isinstance(turn, str) and turn.strip() for turn in turns)
    ):
        raise UserError(
            "field 'turns' must be a list of what the user says, strings that are not empty"
        )
    answers = record.get("reference")
    first = (
        answers[0] if isinstance(answers, list) and answers and isinstance(answers[0], str) else ""
    )
    columns = {name: value for name, value in record.items() if name not in ("turns", "reference")}
    messages = [{"role": "user", "content": turns[0]}]
    return [Example(render_dialogue(messages), first, columns, messages, tuple(turns[1:]))]


def _text_examples(record: dict, prompt_words: int) -> list[Example]:
    """Cut after `prompt_words` words, or in the middle of a text that is shorter than two such prompts."""
    text = _string(record, "text")
    ends = [match.end() for match in re.finditer(r"\S+", text)]  # where each word ends
    if len(ends) < 2:
        return []
    cut = ends[min(prompt_words, len(ends) // 2) - 1]
    return [
        Example(
            text[:cut],
            text[cut:].rstrip(),
            {name: value for name, value in record.items() if name != "text"},
        )
    ]


def _pick_field(record: dict, wanted: str | None, known: tuple[str, ...], kind: str) -> str:
    names = [wanted] if wanted else known
    found = next((name for name in names if name in record), None)
    if found is None:
        have = ", ".join(record) or "nothing"
        alone = "; prompts without answers: 'turns', a list of one string, and --ppo-ratio 1" * (
            kind == "target"
        )
        raise UserError(
            f"no {kind} field: looked for {', '.join(names)}; the record has {have} (see --{kind}-field{alone})"
        )
    return found


def _string(record: dict, name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise UserError(f"field '{name}' must be a string, found {type(value).__name__}")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise UserError(
            f"field '{name}' has half of a surrogate pair, which is no character (a cut emoji?)"
        )
    return value


def read_records(
    source: str,
    limit: int | None = None,
    encoding: str = "utf-8",
    config: str | None = None,
    split: str = "train",
    what: str = "--data",
):
    """Yield the records of a file or hub dataset as dicts. Raises UserError naming the file, and the line where there is one.

    Everything comes through `datasets`, except local JSON: Arrow's JSON reader turns strings that look like dates into dates, long
    numbers into floats, and gives up on a field that appears or changes its type late in the file.
    """
    path = Path(source)
    is_file = path.suffix in BUILDERS or path.exists()
    if is_file and not path.is_file():
        raise UserError(
            f"{what} {source} "
            + ("is a folder; give a file in it" if path.is_dir() else "does not exist")
        )
    if is_file and path.suffix not in BUILDERS:
        raise UserError(f"{what} {source} has an unknown ending; known are {', '.join(BUILDERS)}")
    encoding = (
        "utf-8-sig" if encoding.lower() in ("utf-8", "utf8") else encoding
    )  # drops a byte order mark
    text = _checked_text(path, encoding, what) if is_file and path.suffix != ".parquet" else None
    if path.suffix in (".json", ".jsonl") and is_file:
        yield from itertools.islice(_json_records(path, text), limit)
        return
    import datasets  # slow to import, and the built-in task does without it

    datasets.logging.set_verbosity(logging.CRITICAL)
    logging.getLogger("huggingface_hub").setLevel(
        logging.ERROR
    )  # its retries are no news; the outcome is
    options = {} if text is None else {"encoding": encoding}
    if text is not None and path.suffix == ".txt":
        options |= {"sample_by": "document"}
    if text is not None and path.suffix == ".csv":  # everything is text: "42", "None" and "007" too
        header = next(csv.reader(text.splitlines()))
        options |= {
            "features": datasets.Features({name: datasets.Value("string") for name in header}),
            "keep_default_na": False,
        }
    try:
        if is_file:
            records = datasets.load_dataset(
                BUILDERS[path.suffix],
                data_files=str(path),
                split="train",
                streaming=True,
                **options,
            )
        else:
            records = datasets.load_dataset(
                source, config, split=split, streaming=limit is not None
            )
        if path.suffix == ".txt" and is_file:
            records = _text_records(next(iter(records))["text"])
        for record in itertools.islice(records, limit):
            yield {
                name: value
                for name, value in record.items()
                if path.suffix != ".csv" or value != ""
            }  # an empty cell is absent
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as problem:
        reason = first_line(problem)
        if is_file:
            raise UserError(f"{what} {source} cannot be read: {reason}") from None
        raise UserError(
            f"{what} {source} is no local file and could not be fetched from the Hugging Face hub ({reason}); "
            "check the name, --data-config, --data-split and the network, give a file, or use the built-in --data reviews"
        ) from None


def _text_records(text: str):
    """Cut at `<|endoftext|>` where the file has that, else at line breaks; blank records are dropped."""
    pieces = text.split("<|endoftext|>") if "<|endoftext|>" in text else text.split("\n")
    return ({"text": piece.strip()} for piece in pieces if piece.strip())


def _checked_text(path: Path, encoding: str, what: str) -> str:
    """The text of a file. Raises UserError naming byte and line of what is not `encoding`."""
    try:
        raw = path.read_bytes()
        if not raw.strip():
            raise UserError(f"{what} {path} is empty")
        return raw.decode(encoding)
    except OSError as problem:
        raise UserError(f"{what} {path} cannot be read: {problem.strerror}") from None
    except UnicodeDecodeError as problem:
        line = raw[: problem.start].count(b"\n") + 1
        raise UserError(
            f"{path}:{line}: byte 0x{raw[problem.start]:02x} at offset {problem.start} is not {encoding.removesuffix('-sig')}; "
            "name the file's encoding, for example --encoding latin-1"
        ) from None
    except LookupError:
        raise UserError(f"--encoding {encoding} is not an encoding that Python knows") from None


def _json_records(path: Path, text: str):
    """One object a line, or one array of objects. Raises UserError naming the line."""
    is_array = path.suffix == ".json" and text.lstrip().startswith("[")
    for number, line in enumerate([text] if is_array else text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            found = json.loads(line)
        except json.JSONDecodeError as problem:
            raise UserError(
                f"{path}:{number + problem.lineno - 1}: not valid JSON ({problem.msg}, column {problem.colno})"
            ) from None
        except RecursionError:
            raise UserError(f"{path}:{number}: not usable JSON (nested too deeply)") from None
        for record in found if is_array else [found]:
            if not isinstance(record, dict):
                raise UserError(
                    f"{path}:{number}: expected a JSON object, found {type(record).__name__}"
                )
            yield record


def _where(source: str, number: int) -> str:
    """`file:line` of a record in a line-based file, `source, record n` elsewhere."""
    path = Path(source)
    if path.suffix == ".jsonl" and path.is_file():
        lines = (
            i for i, line in enumerate(path.read_bytes().split(b"\n"), start=1) if line.strip()
        )
        return f"{path}:{next(itertools.islice(lines, number, None))}"
    if path.suffix == ".csv" and path.is_file():
        csv.field_size_limit(sys.maxsize)
        with path.open(newline="", errors="replace") as file:
            reader = csv.reader(file)
            rows = (reader.line_num for row in reader if row)
            return f"{path}:{next(itertools.islice(rows, number + 1, None))}"
    return f"{source}, record {number + 1}"


# ------------------------------------------------------------------------------------------------ preference pairs


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, of which people preferred `chosen`."""

    prompt: str
    chosen: str
    rejected: str
    columns: dict = field(default_factory=dict)


def load_pairs(
    source: str,
    *,
    limit: int | None = None,
    encoding: str = "utf-8",
    config: str | None = None,
    split: str = "train",
    what: str = "--data",
) -> list[Pair]:
    """Pairs from records with `prompt`, `chosen`, `rejected`, or with two transcripts in Anthropic's format.

    A transcript alternates "\\n\\nHuman:" and "\\n\\nAssistant:" turns; the prompt is what the two share up to an "Assistant:".
    Raises UserError naming file and line.
    """
    pairs = []
    for number, record in enumerate(read_records(source, limit, encoding, config, split, what)):
        try:
            chosen, rejected = _string(record, "chosen"), _string(record, "rejected")
            prompt = (
                _string(record, "prompt")
                if record.get("prompt") is not None
                else shared_prompt(chosen, rejected)
            )
            if record.get("prompt") is None:
                chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
            if chosen == rejected:
                continue  # nothing is preferred; such records do occur in public data
            columns = {
                name: value
                for name, value in record.items()
                if name not in ("prompt", "chosen", "rejected") and value is not None
            }
            pairs.append(Pair(prompt, chosen, rejected, columns))
        except UserError as problem:
            raise UserError(f"{_where(source, number)}: {problem}") from None
    if not pairs:
        raise UserError(f"{source} holds no pair of different responses")
    return pairs


def shared_prompt(chosen: str, rejected: str) -> str:
    """The longest common beginning of two transcripts that ends in "Assistant:". Raises UserError if there is none."""
    same = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected)) if a != b),
        min(len(chosen), len(rejected)),
    )
    end = chosen.rfind("\n\nAssistant:", 0, same)
    if end < 0:
        raise UserError(
            "the record has no prompt, and 'chosen' and 'rejected' share no transcript that ends in 'Assistant:'"
        )
    return chosen[: end + len("\n\nAssistant:")]


# ------------------------------------------------------------------------------------------------ split and stream


def split_examples(
    examples: list[Example], holdout: float = 0.1
) -> tuple[list[Example], list[Example]]:
    """(train, held out) by a hash of the record, so that membership depends neither on order nor on what else there is.

    The turns of a dialogue share a side. If a side would be empty, the record with the smallest hash is held out; a single
    record (or dialogue) serves on both sides.
    """

    def place(example: Example) -> float:  # in [0, 1)
        # A dialogue is known by its first user turn; system prompts are shared by many.
        first = example.messages and [m for m in example.messages if m["role"] == "user"][:1]
        key = first or [example.prompt, example.target]
        digest = hashlib.sha256(
            json.dumps(key, ensure_ascii=False, default=str).encode("utf-8", "surrogatepass")
        ).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    places = [place(example) for example in examples]
    cut = holdout if min(places) < holdout <= max(places) else min(places) + 1e-12
    train = [example for example, p in zip(examples, places) if p >= cut]
    held_out = [example for example, p in zip(examples, places) if p < cut]
    return train or held_out, held_out


class BatchStream:
    """Endless batches of items, reshuffled every epoch; each item is drawn once an epoch, and no remainder is dropped.

    Its position is two numbers (`state_dict`), since every epoch's order follows from `seed` and the epoch.
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
        """The next `batch_size` items; a batch may straddle two epochs, and a small source repeats within one batch."""
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


# ------------------------------------------------------------------------------------------------ the built-in task

# review := clause (joint clause){1,3} "."        clause := "the" noun verb [adverb] adjective
NOUNS = "plot music acting ending script cast story humor dialogue pacing photography soundtrack hero villain finale opening".split()
VERBS = "was felt seemed remained".split()
ADVERBS = "really very quite truly often always".split()
PRAISE = "clever moving funny brilliant charming gripping delightful superb warm fresh elegant wonderful".split()
BLAME = "dull clumsy boring awful flat tedious silly weak messy stale lifeless terrible".split()
JOINTS = "and but while yet".split()


def make_reviews(n: int, seed: int = 0) -> list[Example]:
    """`n` reviews of two to four clauses in mixed sentiment; the prompt is the first two to seven words, the target the rest."""
    rng = random.Random(seed)

    def clause() -> list[str]:
        adverb = [rng.choice(ADVERBS)] if rng.random() < 0.5 else []
        return [
            "the",
            rng.choice(NOUNS),
            rng.choice(VERBS),
            *adverb,
            rng.choice(PRAISE if rng.random() < 0.5 else BLAME),
        ]

    examples = []
    for _ in range(n):
        words = clause()
        for _ in range(rng.randint(1, 3)):
            words += [rng.choice(JOINTS), *clause()]
        cut = rng.randint(2, 7)
        examples.append(Example(" ".join(words[:cut]), " " + " ".join(words[cut:] + ["."])))
    return examples


def review_pairs(examples: list[Example], seed: int = 0) -> list[Pair]:
    """For each review, two endings that differ in their judgements alone: one that praises, preferred, and one that blames."""
    rng = random.Random(seed)

    def ending(example: Example, words: list[str]) -> str:
        return " ".join(
            rng.choice(words) if word in PRAISE + BLAME else word
            for word in example.target.split(" ")
        )

    pairs = [
        Pair(example.prompt, ending(example, PRAISE), ending(example, BLAME))
        for example in examples
    ]
    return [pair for pair in pairs if pair.chosen != pair.rejected]


def is_fluent_review(text: str) -> bool:
    """Does the text parse under the grammar above? Exact, so fluency is measured and not guessed."""
    words, i, clauses = text.split(" "), 0, 0
    while True:
        if [word in part for word, part in zip(words[i : i + 3], (["the"], NOUNS, VERBS))] != [
            True
        ] * 3:
            return False
        i += 3
        i += i < len(words) and words[i] in ADVERBS
        if i >= len(words) or words[i] not in PRAISE + BLAME:
            return False
        i, clauses = i + 1, clauses + 1
        if words[i:] == ["."]:
            return 2 <= clauses <= 4
        if i >= len(words) or words[i] not in JOINTS:
            return False
        i += 1


def review_metrics(prompts: list[str], completions: list[str]) -> dict[str, float]:
    """Shares of completions that make a grammatical review with their prompt, that praise more than they blame, and both."""
    fluent = [
        is_fluent_review(prompt + completion)
        for prompt, completion in zip(prompts, completions, strict=True)
    ]
    positive = [
        sum((w in PRAISE) - (w in BLAME) for w in completion.split()) > 0
        for completion in completions
    ]
    both = [f and p for f, p in zip(fluent, positive)]
    n = len(completions)
    return {
        "fluent": sum(fluent) / n,
        "positive": sum(positive) / n,
        "fluent_and_positive": sum(both) / n,
    }


def add_data_flags(group) -> None:
    """How a source is read: the flags that `train.py` and `data.py` share."""
    group.add_argument(
        "--data-config", help="configuration of a hub dataset, such as wikitext-2-raw-v1"
    )
    group.add_argument(
        "--data-split",
        default="train",
        help="split of a hub dataset; a tenth of it is held out by hash",
    )
    group.add_argument(
        "--prompt-field",
        help="column with the prompt (default: prompt, instruction, question or query)",
    )
    group.add_argument(
        "--target-field",
        help="column with the target (default: target, completion, response, output or answer)",
    )
    group.add_argument(
        "--prompt-words",
        type=number(int, 1),
        default=12,
        help="plain text: the first N words are the prompt",
    )
    group.add_argument("--encoding", default="utf-8", help="encoding of a local file")
    group.add_argument("--limit", type=number(int, 1), help="read at most N records")


def data_options(args) -> dict:
    """Those flags -> keyword arguments of `load_examples`."""
    fields = dict(
        prompt_field=args.prompt_field,
        target_field=args.target_field,
        prompt_words=args.prompt_words,
    )
    return dict(
        **fields,
        limit=args.limit,
        encoding=args.encoding,
        config=args.data_config,
        split=args.data_split,
    )


@one_line_errors
def main(argv: list[str]) -> None:
    """What a source becomes: its first examples, and how many there are."""
    parser = Parser(main.__doc__)
    parser.add_argument(
        "source",
        nargs="?",
        default="reviews",
        help="what --data of train.py may be; the flags are those of train.py too",
    )
    add_data_flags(parser)
    args = parser.parse_args(argv)
    examples = load_examples(args.source, **data_options(args))
    for shown in examples[:3]:
        print(
            json.dumps(
                {"prompt": shown.prompt, "target": shown.target, **shown.columns},
                ensure_ascii=False,
                default=str,
            )
        )
    _, held_out = split_examples(examples)
    print(
        f"{len(examples)} examples, {len(held_out)} of them held out, {sum(not e.target for e in examples)} without a target"
    )
    glued = [
        e
        for e in examples
        if e.messages is None
        and e.prompt[-1:].strip()
        and e.target[:1].isascii()
        and e.target[:1].isalnum()
    ]
    if glued:
        print(
            f"note: in {len(glued)} of them prompt and target touch, as in {(glued[0].prompt + glued[0].target)[:60]!r}: end one or begin the other with a space or line break"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
