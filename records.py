"""One record in, examples or a pair out: `to_examples`, `to_prompts`, `to_pair`.

A record is a dict of fields. Whatever belongs to its prompt becomes part of the prompt; what cannot
be used is a UserError that says why. Left out on purpose: trees of messages, pictures, sounds.

    python data.py examples/my_data.jsonl        # print what records become
"""

import difflib
import os
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from engine import UserError
from files import DIALOGUE_FIELDS, PROMPT_FIELDS, TARGET_FIELDS
from messages import (
    checked_text,
    from_guanaco,
    from_json,
    from_transcript,
    is_dialogue,
    render_dialogue,
    said_in,
    to_messages,
    whole_reply,
    with_system,
)

SYSTEM_FIELDS = ("system", "system_prompt", "system_message", "system_instruction")
# What a reader counts and says: {n} is how many, {all} how many examples there are.
NO_TARGET = "{n} of {all} examples have no target: they serve the reward steps only"
WEIGHT_0 = "{n} assistant turns of {source} have weight 0: they are read, but not trained"
SILENT = "{n} assistant turns of {source} are empty: they are read, but not trained"
FIRST = "{n} assistant turns of {source} stand before any user turn: they are read, but not trained"
EMPTY_PROMPT = "{n} of {all} examples have an empty prompt"
REPEATS = "{n} of {all} examples repeat an earlier one, prompt and target: they are trained again"
PAIRS = (
    "{n} of {all} examples are preference pairs, of which the prompts alone are used here: "
    "--algorithm dpo --preference-data learns from them"
)
UNWANTED = "{n} completions of {source} have label false: their prompts serve the reward steps only"
SCRIPTS_WITHOUT_SPACES = re.compile("[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]")  # Thai, Chinese
REPEATED = (
    "in {n} of {all} pairs of {source} both responses repeat the prompt: it is taken off them"
)


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
    # The fields that became prompt and target, as the data name them: rewards receive them too.
    named: dict = field(default_factory=dict, compare=False)


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


# --------------------------------------------------------------------------------------- one record


def to_examples(
    record: dict,
    prompt_field: str | None = None,
    target_field: str | None = None,
    prompt_words: int = 12,
    raw: bool = False,
    counts: Counter | None = None,
) -> list[Example]:
    """The examples of one record: several for a dialogue. `counts` gets the numbers of notes.

    Raises UserError that says which field is missing or of the wrong type.
    """
    _check_no_tree(record)
    record = _other_fields(record)
    counts = Counter() if counts is None else counts
    if prompt_field is None and target_field is None:
        dialogue = _dialogue_in(record)
        if dialogue is not None:
            return _turn_examples(*dialogue, record, counts)
        if "turns" in record:
            return _question_examples(record)
        if "text" in record and not any(n in record for n in (*PROMPT_FIELDS, *TARGET_FIELDS)):
            return _text_examples(record, prompt_words)
        names = [name for name in (*PROMPT_FIELDS, *TARGET_FIELDS) if name in record]
        if is_dialogue(record.get("chosen")) or ("chosen" in record and not names):
            prompt = replace(to_pair(record, raw).sides()[0], target="", reply=None)
            return [replace(prompt, columns=_other_fields(record, *PROMPT_FIELDS))]
    return _prompt_examples(record, prompt_field, target_field, raw, counts)


def to_prompts(
    record: dict,
    prompt_field: str | None = None,
    target_field: str | None = None,
    prompt_words: int = 12,
    raw: bool = False,
    counts: Counter | None = None,
) -> list[Example]:
    """The prompt of one record, as `load_prompts` describes it. Raises UserError likewise."""
    fields = _other_fields(record)
    if prompt_field is None and target_field is None:
        _check_no_tree(record)
        dialogue = _dialogue_in(fields)
        if dialogue is not None:
            return [_dialogue_prompt(*dialogue, fields)]
    # A target that nobody can learn from is no hindrance here.
    names = [target_field] if target_field else TARGET_FIELDS
    useless = {name: fields[name] for name in names if not _is_answer(fields.get(name, "x"))}
    if target_field in useless:
        target_field = None
    rest = {name: value for name, value in record.items() if name not in useless}
    example = to_examples(rest, prompt_field, target_field, prompt_words, raw)[0]
    return [without_target(replace(example, columns={**example.columns, **useless}))]


def _is_answer(value) -> bool:
    return bool(value.strip()) if isinstance(value, str) else is_dialogue(value)


def without_target(example: Example) -> Example:
    columns = {**example.columns, "target": example.target} if example.target else example.columns
    return replace(example, target="", reply=None, columns=columns)


def _check_no_tree(record: dict) -> None:
    """Raises UserError for the records of OASST, in which one prompt has several replies."""
    is_row = "message_id" in record and ("parent_id" in record or "role" in record)
    if is_row or (isinstance(record.get("prompt"), dict) and "replies" in record["prompt"]):
        what = "one message of a tree" if is_row else "a tree of messages"
        raise UserError(f"the record is {what}; expected whole dialogues, in a field 'messages'")


# ----------------------------------------------------------------------------------- prompt, target


def _prompt_examples(
    record: dict, prompt_field: str | None, target_field: str | None, raw: bool, counts: Counter
) -> list[Example]:
    """A prompt and its target, each a string or messages. Without a target it is a prompt alone."""
    asked_for = prompt_field, target_field
    prompt_field = _pick_field(record, prompt_field, PROMPT_FIELDS, "prompt")
    target_field = _pick_target(record, target_field, prompt_field)
    _count_choices(record, (prompt_field, target_field), asked_for, counts)
    start = _prompt_of(record, prompt_field, target_field, raw)
    fields = _other_fields(record, prompt_field, target_field)
    named = {name: record[name] for name in (prompt_field, target_field) if name in record}
    named.pop("prompt", None)  # rewards receive it as `prompts`
    value = record.get(target_field)
    if is_dialogue(value):
        said = [{"role": "user", "content": start.prompt}]
        history = said if start.messages is None else start.messages
        replies, weight_0 = to_messages(value, target_field)
        if replies[0]["role"] != "assistant":
            raise UserError(f"field '{target_field}' does not begin with an assistant turn")
        weight_0 = {i + len(history) for i in weight_0}
        whole = [*history, *replies]
        examples = _turn_examples(whole, weight_0, target_field, record, counts, len(history))
        examples = [replace(e, columns=fields) for e in examples]
    elif value is not None:
        if not checked_text(value, target_field).strip():
            why = "is empty, so there is nothing to learn from it"
            raise UserError(f"field '{target_field}' {why}")
        examples = [replace(start, target=value, columns=fields)]
    else:
        examples = [replace(start, columns=fields)]
    examples = [replace(example, named=named) for example in examples]
    label = str(record.get("label")).strip().lower()
    if target_field == "completion" and label in ("false", "0", "0.0"):
        # KTO: people did not want this completion, so it is no demonstration.
        counts[UNWANTED] += 1
        examples = [replace(examples[0], target="", reply=None)]
    return examples


def _prompt_of(record: dict, field: str, target_field: str | None, raw: bool) -> Example:
    """An example without target: the prompt, with what else of the record belongs to it.

    `context` and `input` are paragraphs after it; system, history and tools make it a dialogue.
    """
    value, messages = record[field], None
    if is_dialogue(value):
        messages, _ = to_messages(value, field)
    else:
        prompt = checked_text(value, field)
        parts = [prompt] if prompt.strip() else []
        for name in ("context", "input"):
            is_part = field in PROMPT_FIELDS and name not in (field, target_field)
            if is_part and name in record:
                more = record[name]
                if not isinstance(more, str):
                    kind = type(more).__name__
                    needed = "belongs to the prompt and must be a string"
                    advice = "rename it if only rewards read it"
                    raise UserError(f"field '{name}' {needed}, found {kind} ({advice})")
                parts += [checked_text(more, name)] if more.strip() else []
        prompt = "\n\n".join(parts) if parts else prompt
    history, system, tools = _history(record), _system(record), _tools(record)
    if messages is None and not (history or system or tools):
        return Example(prompt, "", messages=_turns_of(prompt, raw), is_chat=not raw)
    is_plain = raw and messages is None
    messages = messages or [{"role": "user", "content": prompt}]
    messages = with_system([*history, *messages], system)
    prompt = render_dialogue(messages, tools)
    args = {"tools": tools} if tools else {}
    dialogue = Example(prompt, "", messages=messages, is_chat=True, template_args=args)
    return replace(dialogue, messages=None, is_chat=False) if is_plain else dialogue


def _turns_of(prompt: str, raw: bool) -> list[dict] | None:
    """The dialogue of a prompt in Anthropic's format, for a chat template; None for others."""
    if raw or not prompt.rstrip().endswith("\n\nAssistant:"):
        return None
    return from_transcript(prompt)


def _system(record: dict) -> str:
    """The system prompt that a record has beside its prompt or messages, "" if none."""
    names = [name for name in SYSTEM_FIELDS if name in record]
    texts = [text for text in (checked_text(record[name], name) for name in names) if text.strip()]
    if len(set(texts)) > 1:
        raise UserError(f"fields {' and '.join(map(repr, names))} differ")
    return texts[0] if texts else ""


def _history(record: dict) -> list[dict]:
    """`history`: messages, pairs of [user, assistant], or what the two say in turn."""
    value = from_json(record.get("history"), "history")
    if not value:
        return []
    if is_dialogue(value):
        return to_messages(value, "history")[0]
    pairs = value
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        pairs = [value[i : i + 2] for i in range(0, len(value), 2)]
    is_pairs = isinstance(pairs, list) and all(isinstance(pair, list) for pair in pairs)
    if not is_pairs or not all([type(text) for text in pair] == [str, str] for pair in pairs):
        raise UserError("field 'history' must be a list of [user, assistant] pairs, or of messages")
    roles = ("user", "assistant")
    return [
        {"role": role, "content": checked_text(text, "history")}
        for pair in pairs
        for role, text in zip(roles, pair)
    ]


def _tools(record: dict) -> list[dict]:
    """`tools`, or OpenAI's older `functions`: what the model may call, objects or JSON of them.

    A value that is neither an object nor a list of objects is none.
    """
    name = "tools" if "tools" in record else "functions"
    value = record.get(name)
    if isinstance(value, str) and value.lstrip()[:1] not in ("[", "{"):
        return []
    value = from_json(value, name)
    tools = [from_json(tool, name) for tool in (value if isinstance(value, list) else [value])]
    if not all(isinstance(tool, dict) and tool for tool in tools):
        return []
    if name == "functions":
        return [{"type": "function", "function": tool} for tool in tools]
    return tools


def _text_examples(record: dict, prompt_words: int) -> list[Example]:
    """Split after `prompt_words` words, or in the middle if there are fewer than twice as many."""
    text = checked_text(record["text"], "text")
    ends = [match.end() for match in re.finditer(r"\S+", text)]  # where each word ends
    if len(ends) < 2:
        raise UserError("the text has fewer than two words, too few for a prompt and a target")
    end = ends[min(prompt_words, len(ends) // 2) - 1]
    return [Example(text[:end], text[end:].rstrip(), _other_fields(record, "text"))]


# ---------------------------------------------------------------------------------------- dialogues


def _dialogue_in(record: dict) -> tuple[list[dict], set[int], str] | None:
    """The dialogue of a record: its messages, which of them have weight 0, the field."""
    name = next((name for name in DIALOGUE_FIELDS if name in record), None)
    is_text_alone = "text" in record and not any(name in record for name in PROMPT_FIELDS)
    if name is not None:
        messages, weight_0 = to_messages(record[name], name)
    elif is_text_alone and from_guanaco(checked_text(record["text"], "text")):
        name, messages, weight_0 = "text", from_guanaco(record["text"]), set()
    else:
        return None
    whole = with_system([*_history(record), *messages], _system(record))
    return whole, {i + len(whole) - len(messages) for i in weight_0}, name


def _turn_examples(
    messages: list[dict], weight_0: set[int], name: str, record: dict, counts: Counter, start=0
) -> list[Example]:
    """One example for every turn of the assistant, from `start`, that says something to somebody.

    A dialogue without any is a prompt, up to its first user turn.
    """
    first = next((i for i, m in enumerate(messages) if m["role"] != "assistant"), len(messages))
    spans = range(max(first, start), len(messages))
    replies = [i for i in spans if messages[i]["role"] == "assistant"]
    if not replies:
        return [_dialogue_example(messages, _first_user(messages, name) + 1, record, name)]
    trained = [i for i in replies if said_in(messages[i]).strip() and i not in weight_0]
    if not trained:
        why = "has no assistant turn with content" if not weight_0 else "has only turns of weight 0"
        raise UserError(f"'{name}' {why}, so there is nothing to learn from it")
    counts[WEIGHT_0] += len(weight_0 & set(replies))
    counts[SILENT] += len(set(replies) - weight_0 - set(trained))
    counts[FIRST] += max(0, first - start)
    return [_dialogue_example(messages, i, record, name, answer=messages[i]) for i in trained]


def _dialogue_example(
    messages: list[dict], end: int, record: dict, name: str, answer: dict | None = None
) -> Example:
    """The messages before `end` as a prompt, and the message that answers it, if there is one."""
    tools, history = _tools(record), messages[:end]
    later = tuple(m["content"] for m in messages[end:] if m["role"] == "user")
    return Example(
        render_dialogue(history, tools),
        said_in(answer) if answer else "",
        columns=_other_fields(record, name),
        messages=history,
        user_turns=later,
        reply=whole_reply(answer) if answer else None,
        template_args={"tools": tools} if tools else {},
    )


def _first_user(messages: list[dict], name: str) -> int:
    for i, message in enumerate(messages):
        if message["role"] == "user":
            return i
    raise UserError(f"'{name}' has no user turn")


def _dialogue_prompt(messages: list[dict], weight_0: set[int], name: str, record: dict) -> Example:
    """The dialogue up to the first user turn without an answer, or up to the first of all."""
    first = _first_user(messages, name)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant" and said_in(m).strip()]
    last = max(answers, default=-1)
    open_turns = [i for i, m in enumerate(messages) if m["role"] == "user" and i > last]
    end = open_turns[0] if open_turns else first
    example = _dialogue_example(messages, end + 1, record, name)
    target = next((said_in(messages[i]) for i in answers if i > end and i not in weight_0), "")
    return without_target(replace(example, target=target))


def _question_examples(record: dict) -> list[Example]:
    """`turns`: what a user says, a list of strings (MT-bench); `reference` may hold the answers."""
    turns = from_json(record["turns"], "turns")
    is_list = isinstance(turns, list) and len(turns) > 0
    if not is_list or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        expected = "a list of what the user says, strings that are not empty"
        raise UserError(f"field 'turns' must be {expected}")
    answers = record.get("reference")
    if isinstance(record["turns"], str):  # a table: both are JSON
        answers = from_json(answers, "reference")
    answer = answers[0] if isinstance(answers, list) and answers else answers
    said = [{"role": "user", "content": turn} for turn in turns]
    messages = with_system(said, _system(record))
    example = _dialogue_example(messages, len(messages) - len(turns) + 1, record, "turns")
    fields = _other_fields(example.columns, "reference")
    return [replace(example, target=answer if isinstance(answer, str) else "", columns=fields)]


# -------------------------------------------------------------------------------------------- pairs


def to_pair(record: dict, raw: bool = False, counts: Counter | None = None) -> Pair:
    """The pair of one record. Without a prompt field, the prompt is what two dialogues share.

    A prompt that both responses repeat is taken off them. `counts` gets the numbers of notes.
    Raises UserError that says which field is missing or no string, or that nothing is shared.
    """
    record = _other_fields(record)
    counts = Counter() if counts is None else counts
    sides = [record.get(name) for name in ("chosen", "rejected")]
    if None in sides:
        needed = "a preference pair has 'chosen' and 'rejected'"
        raise UserError(f"{needed}, the record has {', '.join(record) or 'nothing'}")
    if all(is_dialogue(side) for side in sides):
        return _message_pair(record)
    chosen, rejected = (checked_text(record.get(name), name) for name in ("chosen", "rejected"))
    prompt_field = next((name for name in PROMPT_FIELDS if name in record), None)
    fields = _other_fields(record, prompt_field, "chosen", "rejected")
    if prompt_field is not None:
        start = _prompt_of(record, prompt_field, None, raw)
        prompt, messages, args = start.prompt, start.messages, start.template_args
        n = _repeated(prompt, chosen, rejected) or _repeated(record[prompt_field], chosen, rejected)
        counts[REPEATED] += n > 0
        chosen, rejected = chosen[n:], rejected[n:]
    else:
        same = os.path.commonprefix([chosen, rejected])  # works on any two strings
        before, header, _ = same.rpartition("\n\nAssistant:")
        if not header:
            shared = "'chosen' and 'rejected' share no transcript that ends in 'Assistant:'"
            raise UserError(f"the record has no prompt, and {shared}")
        prompt, args = before + header, {}
        messages = _turns_of(prompt, raw)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not response.strip():
            raise UserError(f"'{name}' is empty, so there is nothing to compare")
    is_chat = messages is not None or not raw
    return Pair(prompt, chosen, rejected, fields, messages, is_chat=is_chat, template_args=args)


def _repeated(prompt: str | list, chosen: str, rejected: str) -> int:
    """How many characters at the beginning of both responses are the prompt again, maybe 0.

    Where one response alone begins so, it quotes the prompt, and people judged it as it is. One
    word is no sign either ("Hello" is answered by "Hello"), but a sentence of a script without
    spaces is. Nothing is cut inside a word, and something must be left of both.
    """
    if not isinstance(prompt, str):
        return 0
    is_sentence = SCRIPTS_WITHOUT_SPACES.search(prompt) and not prompt[-1].isalnum()
    if len(prompt.split()) < 2 and not is_sentence:
        return 0
    for response in (chosen, rejected):
        rest = response[len(prompt) :]
        is_inside_a_word = prompt[-1:].isalnum() and rest[:1].isalnum()
        if not response.startswith(prompt) or not rest.strip() or is_inside_a_word:
            return 0
    return len(prompt)


def _message_pair(record: dict) -> Pair:
    """`chosen` and `rejected` are messages: each a reply, or a whole dialogue that ends in it."""
    sides = [to_messages(record[name], name)[0] for name in ("chosen", "rejected")]
    prompt_field = next((name for name in PROMPT_FIELDS if name in record), None)
    history = []
    if prompt_field is not None:
        start = _prompt_of(record, prompt_field, None, raw=False)
        history = start.messages or [{"role": "user", "content": start.prompt}]
    is_whole = any(m["role"] in ("system", "user") for side in sides for m in side)
    before = [] if is_whole else history
    whole = [with_system([*before, *side], _system(record)) for side in sides]
    has_messages = is_dialogue(record.get(prompt_field))
    if has_messages and any(side[: len(history)] != history for side in whole):
        raise UserError(f"'chosen' and 'rejected' do not begin with the messages of {prompt_field}")
    n = min(len(side) for side in whole) - 1
    if len({len(side) for side in whole}) != 1 or whole[0][:n] != whole[1][:n]:
        raise UserError("'chosen' and 'rejected' differ in more than their last turn")
    shared, replies = whole[0][:n], [side[n] for side in whole]
    if any(reply["role"] != "assistant" or not said_in(reply).strip() for reply in replies):
        raise UserError("'chosen' and 'rejected' must each end in an assistant turn with content")
    if all(message["role"] == "assistant" for message in shared):
        raise UserError("the record has no prompt: 'chosen' and 'rejected' hold replies alone")
    tools = _tools(record)
    return Pair(
        render_dialogue(shared, tools),
        *(said_in(reply) for reply in replies),
        columns=_other_fields(record, prompt_field, "chosen", "rejected"),
        messages=shared,
        chosen_reply=whole_reply(replies[0]),
        rejected_reply=whole_reply(replies[1]),
        template_args={"tools": tools} if tools else {},
    )


# ------------------------------------------------------------------------------------------- fields


def _other_fields(record: dict, *used: str | None) -> dict:
    """The fields that hold something (readers fill absent ones with None), without the `used`."""
    return {name: v for name, v in record.items() if v is not None and name not in used}


def _pick_field(record: dict, wanted: str | None, known: tuple[str, ...], kind: str) -> str:
    """The field that holds the `kind` ("prompt", "target"): `wanted`, else the first known one."""
    names = [wanted] if wanted else known
    for name in names:
        if name in record:
            return name
    looked_for = f"no {kind} field: looked for {', '.join(names)}"
    similar = _similar(record, names)
    if similar is not None:
        raise UserError(f"{looked_for}; did you mean --{kind}-field {similar}?")
    present = ", ".join(record) or "nothing"
    raise UserError(f"{looked_for}; the record has {present} (see --{kind}-field)")


def _pick_target(record: dict, wanted: str | None, prompt_field: str) -> str | None:
    """The field that holds the target, None if there is none. UserError for a likely typo."""
    rest = _other_fields(record, prompt_field)
    known = [name for name in TARGET_FIELDS if name in rest]
    if wanted is None and not known:
        if "text" in rest and prompt_field in PROMPT_FIELDS:
            return "text"
        if _similar(rest, TARGET_FIELDS) is None:
            return None
    return _pick_field(rest, wanted, TARGET_FIELDS, "target")


def _count_choices(record: dict, chosen: tuple, asked_for: tuple, counts: Counter) -> None:
    """Count the record where other fields hold texts that could be its prompt or target too.

    `input` beside another prompt is a part of it. `chosen` and `asked_for`: (prompt, target).
    """
    for kind, known, i in (("prompt", PROMPT_FIELDS, 0), ("target", TARGET_FIELDS, 1)):
        used = (*chosen, "input") if kind == "prompt" else chosen
        others = [n for n in known if n not in used and n in record and _is_answer(record[n])]
        if chosen[i] in known and asked_for[i] is None and others:
            rest = ", ".join(map(repr, others))
            what = f"'{chosen[i]}' is the {kind}, and not {rest} (--{kind}-field chooses)"
            counts[f"in {{n}} records of {{source}} {what}"] += 1


def _similar(record: dict, names: Iterable[str]) -> str | None:
    """A text field whose name is nearly one of the names."""
    for name, value in record.items():
        is_near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.8)
        if is_near and isinstance(value, str):
            return name
    return None
