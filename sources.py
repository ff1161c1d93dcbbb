"""Where examples come from: a file, a hub dataset or the built-in task.

A record is a dict of fields: `read_records` reads them, `to_examples` turns one into examples, and
an error names the file, and the line where there is one. Token ids and batches are in data.py.
Left out on purpose: endless corpora, guessing an encoding, cleaning texts.

    python data.py examples/my_data.jsonl        # print what a source becomes
"""

import csv
import itertools
import json
import logging
import os
import random
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

from engine import UserError, first_line, number
from reviews import BLAME, PRAISE, review_texts, with_judgements

PROMPT_FIELDS = ("prompt", "instruction", "question", "query")
TARGET_FIELDS = ("target", "completion", "response", "output", "answer")
ROLES = ("system", "user", "assistant", "tool")
ENDINGS = (".jsonl", ".json", ".csv", ".parquet", ".txt")
WHOLE_FILE = dict(split="train", streaming=True)  # how `datasets` is to read a local file


@dataclass(frozen=True)
class Example:
    """One training example. `columns` are the record's other fields; rewards receive them by name.

    `messages` is set where the prompt is the history of a dialogue: a list of {role, content};
    `user_turns` are the later turns of its user. An empty `target` means that there is none: then
    only PPO can use the example.
    """

    prompt: str
    target: str
    columns: dict = field(default_factory=dict)
    messages: list[dict] | None = None
    user_turns: tuple[str, ...] = ()
    # The assistant's whole message, where it holds more than the target: tool calls, reasoning.
    reply: dict | None = field(default=None, compare=False)
    # Prompt and target are a question and its answer, which a chat template writes if there is one.
    is_chat: bool = field(default=False, compare=False)
    # Keyword arguments of the chat template: `tools`, and those of --template-args.
    template_args: dict = field(default_factory=dict, compare=False)
    place: str = field(default="", compare=False)  # file:line, or source and number of the record


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, of which people preferred `chosen`. Fields as in Example."""

    prompt: str
    chosen: str
    rejected: str
    columns: dict = field(default_factory=dict)
    messages: list[dict] | None = None
    chosen_reply: dict | None = field(default=None, compare=False)
    rejected_reply: dict | None = field(default=None, compare=False)
    is_chat: bool = field(default=False, compare=False)
    template_args: dict = field(default_factory=dict, compare=False)
    place: str = field(default="", compare=False)

    def sides(self) -> tuple[Example, Example]:
        """The chosen and the rejected response, each as an example."""
        options = dict(is_chat=self.is_chat, template_args=self.template_args, place=self.place)
        shared = dict(columns=self.columns, messages=self.messages, **options)
        return (
            Example(self.prompt, self.chosen, reply=self.chosen_reply, **shared),
            Example(self.prompt, self.rejected, reply=self.rejected_reply, **shared),
        )


# ------------------------------------------------------------------------------------ whole sources


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
    """Examples from `reviews` (built in), a file that ends in one of ENDINGS, or a hub dataset id.

    A record is one of: prompt + target (other names above; Alpaca's instruction, input, output);
    `messages`, one example for every assistant turn, with its history as prompt; `turns`, what a
    user says in a dialogue that has no answers yet; `text`, whose first `prompt_words` words are
    the prompt. At most `limit` records are read. Raises UserError that names file and line.
    """
    if source == "reviews":
        return make_reviews(limit or 4000, seed)
    examples, too_short = [], 0
    for index, record in enumerate(read_records(source, limit, encoding, config, split)):
        try:
            new_examples = to_examples(record, prompt_field, target_field, prompt_words)
        except UserError as problem:
            raise UserError(f"{_where(source, index)}: {problem}") from None
        examples += new_examples
        if not new_examples:
            too_short += 1
    if too_short:
        why = "were left out, too short to be split into prompt and target"
        print(f"note: {too_short} texts of {source} {why}", file=sys.stderr)
    if not examples:
        raise UserError(f"--data {source} holds no record that can be used")
    # Every example gets every field, None where its record lacks it: a reward can rely on them.
    names = dict.fromkeys(name for example in examples for name in example.columns)
    return [replace(e, columns={name: e.columns.get(name) for name in names}) for e in examples]


def load_pairs(
    source: str,
    *,
    limit: int | None = None,
    encoding: str = "utf-8",
    config: str | None = None,
    split: str = "train",
    what: str = "--data",
) -> list[Pair]:
    """Pairs from records with `prompt`, `chosen`, `rejected`, or with two transcripts.

    A transcript (Anthropic's format) alternates "\\n\\nHuman:" and "\\n\\nAssistant:" turns; the
    prompt is what the two share up to an "Assistant:". Raises UserError that names file and line.
    """
    pairs = []
    for index, record in enumerate(read_records(source, limit, encoding, config, split, what)):
        try:
            pair = to_pair(record)
        except UserError as problem:
            raise UserError(f"{_where(source, index)}: {problem}") from None
        # Public data has pairs of equal responses, in which neither is preferred.
        if pair.chosen != pair.rejected:
            pairs.append(pair)
    if not pairs:
        raise UserError(f"{source} holds no pair of different responses")
    return pairs


def make_reviews(n: int, seed: int = 0) -> list[Example]:
    """`n` examples of the built-in task, which reviews.py describes."""
    return [Example(prompt, target) for prompt, target in review_texts(n, seed)]


def review_pairs(examples: list[Example], seed: int = 0) -> list[Pair]:
    """For each review two endings that differ only in their adjectives; praise is preferred."""
    rng = random.Random(seed)
    pairs = []
    for example in examples:
        praising = with_judgements(example.target, PRAISE, rng)
        blaming = with_judgements(example.target, BLAME, rng)
        if praising != blaming:
            pairs.append(Pair(example.prompt, praising, blaming))
    return pairs


def add_data_flags(group) -> None:
    """How a source is read: the flags that `train.py` and `data.py` share."""
    add = group.add_argument
    add("--data-config", help="configuration of a hub dataset, such as wikitext-2-raw-v1")
    add("--data-split", default="train", help="split of a hub dataset; a tenth is held out by hash")
    add("--prompt-field", help=f"field with the prompt (default: {', '.join(PROMPT_FIELDS)})")
    add("--target-field", help=f"field with the target (default: {', '.join(TARGET_FIELDS)})")
    words_help = "plain text: the first N words are the prompt"
    add("--prompt-words", type=number(int, 1), default=12, help=words_help)
    add("--encoding", default="utf-8", help="encoding of a local file")
    add("--limit", type=number(int, 1), help="read at most N records")


def data_options(args) -> dict:
    """The flags of `add_data_flags` -> keyword arguments of `load_examples`."""
    fields = dict(prompt_field=args.prompt_field, target_field=args.target_field)
    reading = dict(limit=args.limit, encoding=args.encoding)
    dataset = dict(config=args.data_config, split=args.data_split)
    return dict(**fields, **reading, **dataset, prompt_words=args.prompt_words)


# --------------------------------------------------------------------------------------- one record


def to_examples(
    record: dict,
    prompt_field: str | None = None,
    target_field: str | None = None,
    prompt_words: int = 12,
) -> list[Example]:
    """The examples of one record: several for a dialogue, none for a text of one word or none.

    Raises UserError that says which field is missing or of the wrong type.
    """
    record = _other_fields(record)
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
    fields = _other_fields(record, prompt_field, target_field)
    if prompt_field == "instruction" and record.get("input"):  # Alpaca
        prompt = f"{prompt}\n\n{_string(fields, 'input')}"
    if not target.strip():
        raise UserError(f"field '{target_field}' is empty, so there is nothing to learn from it")
    return [Example(prompt, target, fields)]


def render_dialogue(messages: list[dict]) -> str:
    """The plain template, for models that have no chat template of their own.

    For each message `Role:`, a line break, the content, a blank line; then `Assistant:`.
    """
    turns = [f"{message['role'].capitalize()}:\n{message['content']}\n\n" for message in messages]
    return "".join(turns) + "Assistant:\n"


def plain_reply(said: str) -> str:
    """What the plain template puts between two responses: the user's turn, the next header."""
    return "\n\n" + render_dialogue([{"role": "user", "content": said}])


def _dialogue_examples(record: dict) -> list[Example]:
    """`messages`: one example for every turn of the assistant that has content."""
    messages = record["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        raise UserError("field 'messages' must be a list of {role, content} objects")
    for message in messages:
        role = message.get("role")
        if role not in ROLES:
            raise UserError(f"unknown role {role!r} in 'messages' (known: {', '.join(ROLES)})")
        _string(message, "content")
    fields = _other_fields(record, "messages")
    examples = []
    for i, message in enumerate(messages):
        if message["role"] == "assistant" and message["content"].strip():
            history, later = messages[:i], messages[i + 1 :]
            user_turns = tuple(m["content"] for m in later if m["role"] == "user")
            prompt = render_dialogue(history)
            examples.append(Example(prompt, message["content"], fields, history, user_turns))
    if not examples:
        why = "has no assistant turn with content, so there is nothing to learn from it"
        raise UserError(f"'messages' {why}")
    return examples


def _question_examples(record: dict) -> list[Example]:
    """`turns`: what a user says, a list of strings (MT-bench); `reference` may hold the answers."""
    turns = record["turns"]
    is_list = isinstance(turns, list) and len(turns) > 0
    if not is_list or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        expected = "a list of what the user says, strings that are not empty"
        raise UserError(f"field 'turns' must be {expected}")
    answers, target = record.get("reference"), ""
    if isinstance(answers, list) and answers and isinstance(answers[0], str):
        target = answers[0]
    messages = [{"role": "user", "content": turns[0]}]
    fields = _other_fields(record, "turns", "reference")
    return [Example(render_dialogue(messages), target, fields, messages, tuple(turns[1:]))]


def _text_examples(record: dict, prompt_words: int) -> list[Example]:
    """Split after `prompt_words` words, or in the middle if there are fewer than twice as many."""
    text = _string(record, "text")
    ends = [match.end() for match in re.finditer(r"\S+", text)]  # where each word ends
    if len(ends) < 2:
        return []
    end = ends[min(prompt_words, len(ends) // 2) - 1]
    return [Example(text[:end], text[end:].rstrip(), _other_fields(record, "text"))]


def to_pair(record: dict) -> Pair:
    """The pair of one record. Without a field `prompt`, the prompt is what two transcripts share.

    Raises UserError that says which field is missing or no string, or that nothing is shared.
    """
    chosen, rejected = _string(record, "chosen"), _string(record, "rejected")
    fields = _other_fields(record, "prompt", "chosen", "rejected")
    if record.get("prompt") is not None:
        return Pair(_string(record, "prompt"), chosen, rejected, fields)
    same = os.path.commonprefix([chosen, rejected])  # works on any two strings
    before, header, _ = same.rpartition("\n\nAssistant:")
    if not header:
        shared = "'chosen' and 'rejected' share no transcript that ends in 'Assistant:'"
        raise UserError(f"the record has no prompt, and {shared}")
    start = len(before + header)
    return Pair(same[:start], chosen[start:], rejected[start:], fields)


def _other_fields(record: dict, *used: str) -> dict:
    """The fields that hold something (readers fill absent ones with None), without the `used`."""
    return {name: v for name, v in record.items() if v is not None and name not in used}


def _pick_field(record: dict, wanted: str | None, known: tuple[str, ...], kind: str) -> str:
    """The field that holds the `kind` ("prompt", "target"): `wanted`, else the first known one."""
    names = [wanted] if wanted else known
    for name in names:
        if name in record:
            return name
    hint = f"see --{kind}-field"
    if kind == "target":
        hint += "; prompts without answers: 'turns', a list of one string, and --ppo-ratio 1"
    present = ", ".join(record) or "nothing"
    looked_for = f"no {kind} field: looked for {', '.join(names)}"
    raise UserError(f"{looked_for}; the record has {present} ({hint})")


def _string(record: dict, name: str) -> str:
    """The text of a field. Raises UserError for anything else."""
    value = record.get(name)
    if not isinstance(value, str):
        raise UserError(f"field '{name}' must be a string, found {type(value).__name__}")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        what = "half of a surrogate pair, which is no character (a truncated emoji?)"
        raise UserError(f"field '{name}' has {what}")
    return value


# ------------------------------------------------------------------------------------------ records


def read_records(
    source: str,
    limit: int | None = None,
    encoding: str = "utf-8",
    config: str | None = None,
    split: str = "train",
    what: str = "--data",
):
    """Yield the records of a file or hub dataset as dicts.

    JSON is not read by `datasets`: Arrow's JSON reader turns strings that look like dates into
    dates, long numbers into floats, and fails where the type of a field changes late in the file.
    `what` is the flag that errors name. Raises UserError that names the file, and the line where
    there is one.
    """
    path = Path(source)
    if path.suffix not in ENDINGS and not path.exists():
        unreachable = "is no local file and could not be fetched from the Hugging Face hub"
        advice = (
            "check the name, --data-config, --data-split and the network, "
            "give a file, or use the built-in --data reviews"
        )
        error = (f"{what} {source} {unreachable} (", f"); {advice}")
        options = dict(split=split, streaming=limit is not None)
        records = _dataset_records(error, source, config, **options)
    elif path.is_dir():
        raise UserError(f"{what} {source} is a folder; give a file in it")
    elif not path.is_file():
        raise UserError(f"{what} {source} does not exist")
    elif path.suffix not in ENDINGS:
        raise UserError(f"{what} {source} has an unknown ending; known are {', '.join(ENDINGS)}")
    else:
        records = _file_records(path, encoding, what)
    yield from itertools.islice(records, limit)


def _file_records(path: Path, encoding: str, what: str):
    error = (f"{what} {path} cannot be read: ", "")
    if path.suffix == ".parquet":
        return _dataset_records(error, "parquet", data_files=str(path), **WHOLE_FILE)
    if encoding.lower() in ("utf-8", "utf8"):
        encoding = "utf-8-sig"  # drops a byte order mark
    text = _checked_text(path, encoding, what)
    if path.suffix == ".csv":
        return _csv_records(path, text, encoding, error)
    if path.suffix == ".txt":
        return _text_records(text)
    return _json_records(path, text)


def _checked_text(path: Path, encoding: str, what: str) -> str:
    """The text of a file. Raises UserError that names byte and line of what is not `encoding`."""
    try:
        raw = path.read_bytes()
        if not raw.strip():
            raise UserError(f"{what} {path} is empty")
        return raw.decode(encoding)
    except OSError as problem:
        raise UserError(f"{what} {path} cannot be read: {problem.strerror}") from None
    except UnicodeDecodeError as problem:
        line = raw[: problem.start].count(b"\n") + 1
        bad_byte = f"byte 0x{raw[problem.start]:02x} at offset {problem.start}"
        raise UserError(
            f"{path}:{line}: {bad_byte} is not {encoding.removesuffix('-sig')}; "
            "name the file's encoding, for example --encoding latin-1"
        ) from None
    except LookupError:
        raise UserError(f"--encoding {encoding} is not an encoding that Python knows") from None


def _json_records(path: Path, text: str):
    """One object a line, or one array of objects (.json). Raises UserError that names the line."""
    is_array = path.suffix == ".json" and text.lstrip().startswith("[")
    documents = [text] if is_array else text.split("\n")
    for line, document in enumerate(documents, start=1):
        if not document.strip():
            continue
        try:
            parsed = json.loads(document)
        except json.JSONDecodeError as problem:
            where = f"{path}:{line + problem.lineno - 1}"
            reason = f"{problem.msg}, column {problem.colno}"
            raise UserError(f"{where}: not valid JSON ({reason})") from None
        except RecursionError:
            raise UserError(f"{path}:{line}: not usable JSON (nested too deeply)") from None
        for record in parsed if is_array else [parsed]:
            if not isinstance(record, dict):
                kind = type(record).__name__
                raise UserError(f"{path}:{line}: expected a JSON object, found {kind}")
            yield record


def _text_records(text: str):
    """Split at `<|endoftext|>` if the file has it, else at line breaks; blank texts are dropped."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    separator = "<|endoftext|>" if "<|endoftext|>" in text else "\n"
    return ({"text": piece.strip()} for piece in text.split(separator) if piece.strip())


def _csv_records(path: Path, text: str, encoding: str, error: tuple[str, str]):
    """Every cell is text, "42", "None" and "007" too; a field whose cell is empty is absent."""
    import datasets  # slow to import, and the built-in task does not need it

    header = next(csv.reader(text.splitlines()))
    features = datasets.Features({name: datasets.Value("string") for name in header})
    options = dict(features=features, keep_default_na=False, encoding=encoding, **WHOLE_FILE)
    for record in _dataset_records(error, "csv", data_files=str(path), **options):
        yield {name: value for name, value in record.items() if value != ""}


def _dataset_records(error: tuple[str, str], *args, **options):
    """The records of `datasets.load_dataset(*args, **options)`.

    Raises UserError: `error` is what it says before and after the reason that `datasets` gives.
    """
    import datasets

    datasets.logging.set_verbosity(logging.CRITICAL)
    # Only the result matters, not the hub's messages about its retries.
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)
    try:
        yield from datasets.load_dataset(*args, **options)
    except (OSError, ValueError, KeyError, TypeError, datasets.exceptions.DatasetsError) as problem:
        raise UserError(error[0] + first_line(problem) + error[1]) from None


def _where(source: str, index: int) -> str:
    """`file:line` of record `index` (from 0) in a .jsonl or .csv file, else `source, record n`.

    The file is read again: `datasets` does not say on which line a CSV record stood.
    """
    path = Path(source)
    if not path.is_file() or path.suffix not in (".jsonl", ".csv"):
        return f"{source}, record {index + 1}"
    if path.suffix == ".jsonl":
        content = path.read_bytes().split(b"\n")
        lines = [line for line, record in enumerate(content, start=1) if record.strip()]
        return f"{path}:{lines[index]}"
    csv.field_size_limit(sys.maxsize)
    with path.open(newline="", errors="replace") as file:
        reader = csv.reader(file)
        lines = [reader.line_num for row in reader if row]  # the header's is the first
    return f"{path}:{lines[index + 1]}"
