"""Dialogues as data have them, and as this project has them: a list of {role, content} objects.

`to_messages` reads the shapes that public data use, `render_dialogue` is the plain template.
Left out on purpose: pictures and sounds in messages, trees of messages.

    python data.py examples/questions.jsonl      # dialogues of one turn, as the plain template
"""

import ast
import json
import re

from engine import UserError

ROLES = ("system", "user", "assistant", "tool")
OTHER_NAMES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "chatbot": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
    "function_response": "tool",
}
REASONING = ("reasoning_content", "reasoning", "thinking")


# --------------------------------------------------------------------------------------- in and out


def to_messages(value, name: str = "messages") -> tuple[list[dict], set[int]]:
    """A field that holds a dialogue -> its messages, and which of them have weight 0.

    A message is {role, content} or {from, value}, with other keys as they are. The field may be
    one message, or JSON as text. Raises UserError that says what field `name` has instead.
    """
    value = from_json(value, name)
    turns = [value] if isinstance(value, dict) else value
    if isinstance(turns, list):
        turns = [from_json(turn, name) for turn in turns]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise UserError(f"field '{name}' must be a list of {{role, content}} objects")
    weights = [turn.get("weight") for turn in turns]
    if any(weight not in (None, 0, 1) for weight in weights):
        raise UserError(f"a weight in '{name}' is not 0 or 1")
    return [_message(turn, name) for turn in turns], {i for i, w in enumerate(weights) if w == 0}


def is_dialogue(value) -> bool:
    """Is the value of a field that may be a string a list of messages, or one, maybe as JSON?"""
    if isinstance(value, str):
        if re.match(r"\s*\[\s*\{\s*['\"](role|from|content|value)['\"]\s*:", value):
            value = from_json(value, "a list of messages")
        elif not re.match(r"\s*\[\s*\{", value):
            return False
        else:
            try:
                value = json.loads(value)
            except json.JSONDecodeError:
                return False  # a text that begins with brackets
    turns = value if isinstance(value, list) else [value]
    return turns != [] and all(
        isinstance(turn, dict) and ("role" in turn or "from" in turn) for turn in turns
    )


def from_json(value, name: str):
    """What a text that begins as a JSON array or object holds; any other value as it is."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as problem:
        reason = f"is not valid JSON ({problem})"
    try:
        return ast.literal_eval(value)  # as Python prints a list: pandas writes it so
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise UserError(f"field '{name}' {reason}") from None


def checked_text(value, name: str) -> str:
    """The value of a field, a string. Raises UserError for anything else."""
    if not isinstance(value, str):
        found = type(value).__name__
        if isinstance(value, int | float):
            found += " (a number needs quotes)"
        raise UserError(f"field '{name}' must be a string, found {found}")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        what = "half of a surrogate pair, which is no character (a truncated emoji?)"
        raise UserError(f"field '{name}' has {what}")
    return value


def render_dialogue(messages: list[dict], tools: list | None = None) -> str:
    """The plain template, for models that have no chat template of their own.

    For each message `Role:`, a line break, what it says, a blank line; then `Assistant:`. Before
    them stand the tools that the model may call, as JSON.
    """
    turns = [f"{message['role'].capitalize()}:\n{said_in(message)}\n\n" for message in messages]
    header = f"Tools:\n{json.dumps(tools, ensure_ascii=False)}\n\n" if tools else ""
    return header + "".join(turns) + "Assistant:\n"


def plain_reply(said: str) -> str:
    """What the plain template puts between two responses: the user's turn, the next header."""
    return "\n\n" + render_dialogue([{"role": "user", "content": said}])


def said_in(message: dict) -> str:
    """What the plain template writes for a message: its content, then a line for each tool call."""
    lines = [message["content"]] if message["content"] else []
    for call in message.get("tool_calls", ()):
        function = {key: call["function"][key] for key in ("name", "arguments")}
        lines.append(json.dumps(function, ensure_ascii=False))
    return "\n".join(lines)


def whole_reply(message: dict) -> dict | None:
    """The message, if it holds more than content: tool calls or reasoning."""
    has_more = any(message.get(key) for key in ("tool_calls", *REASONING))
    return message if has_more else None


def with_system(messages: list[dict], system: str) -> list[dict]:
    """The messages, with a system turn in front unless they begin with the same one.

    Raises UserError where they begin with another.
    """
    if not system.strip():
        return messages
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": system}, *messages]
    if messages[0]["content"].strip() != system.strip():
        raise UserError("the record has two system prompts: a field, and the first of its messages")
    return messages


# -------------------------------------------------------------------------------------- one message


def _message(turn: dict, name: str) -> dict:
    """{role, content} and the other keys of a turn that hold something."""
    keys = ("role", "content") if "role" in turn else ("from", "value")
    role = turn.get(keys[0])
    if isinstance(role, str):
        role = OTHER_NAMES.get(role.strip().lower(), role.strip().lower())
    if role == "function_call":
        raise UserError(f"'{name}' has a turn of role 'function_call'; expected 'tool_calls'")
    if role not in ROLES:
        shown = turn.get(keys[0])
        raise UserError(f"unknown role {shown!r} in '{name}' (known: {', '.join(ROLES)})")
    calls = _tool_calls(turn)
    content = turn.get(keys[1], turn.get("content"))
    if content is None and calls:
        content = ""
    message = {"role": role, "content": _joined(content, keys[1], name)}
    used = (*keys, "role", "content", "weight", "tool_calls", "function_call")
    message |= {key: v for key, v in turn.items() if key not in used and v is not None}
    return message | {"tool_calls": calls} if calls else message


def _joined(content, key: str, name: str) -> str:
    """Content that is a list of texts, as one text."""
    if not isinstance(content, list):
        return checked_text(content, key)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else "text"
        if kind != "text":
            raise UserError(f"'{name}' has content of type {kind!r}; only text can be read")
        texts.append(checked_text(part.get("text") if isinstance(part, dict) else part, key))
    return "".join(texts)


def _tool_calls(turn: dict) -> list[dict]:
    """The calls of a turn, as chat templates expect them: arguments are objects, not JSON texts."""
    calls = from_json(turn.get("tool_calls"), "tool_calls") or []
    if turn.get("function_call"):  # the older name, for one call
        calls = [{"type": "function", "function": turn["function_call"]}]
    if not isinstance(calls, list):
        raise UserError(f"field 'tool_calls' must be a list, found {type(calls).__name__}")
    return [_tool_call(from_json(call, "tool_calls")) for call in calls]


def _tool_call(call) -> dict:
    is_flat = isinstance(call, dict) and "function" not in call
    call = {"type": "function", "function": call} if is_flat else call
    function = from_json(call["function"], "function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise UserError("a tool call has no function with a name")
    arguments = from_json(function.get("arguments") or {}, "arguments")
    if not isinstance(arguments, dict):
        raise UserError(f"the arguments of tool call {function['name']!r} are no JSON object")
    return {**call, "function": {**function, "arguments": arguments}}


# -------------------------------------------------------------------------------------- transcripts


def from_transcript(text: str) -> list[dict] | None:
    """Anthropic's transcripts: "\\n\\nHuman: ...\\n\\nAssistant: ..."; None if it is none."""
    return _split_turns(text, r"\n\n(Human|Assistant):")


def from_guanaco(text: str) -> list[dict] | None:
    """A text of "### Human: ...### Assistant: ..."; what stands before is a system turn."""
    if "### Human:" not in text or "### Assistant:" not in text:
        return None
    return _split_turns(text, r"### (Human|Assistant):")


def _split_turns(text: str, mark: str) -> list[dict] | None:
    before, *pieces = re.split(mark, text)
    if not pieces or (before.strip() and mark.startswith(r"\n")):
        return None
    messages = [
        {"role": OTHER_NAMES.get(who.lower(), "assistant"), "content": said.strip()}
        for who, said in zip(pieces[::2], pieces[1::2])
    ]
    if messages[-1] == {"role": "assistant", "content": ""}:
        messages.pop()  # here a response follows
    return with_system(messages, before.strip())
