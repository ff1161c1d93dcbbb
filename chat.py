"""From text to token ids: the prompt, the answer, and what a chat template writes for them.

A chat template writes a whole dialogue, the answer with it. That text is split where the answer
begins, so that SFT, PPO, DPO and evaluation read the same prompt, and SFT trains what the template
writes: a header such as `<think></think>`, the answer, the mark that ends the turn.

    <|im_start|>user\\nHi<|im_end|>\\n<|im_start|>assistant\\n  Hello!<|im_end|>
    |---------------------- prompt --------------------|  |---- answer ---|

Without a template, or for a text that is no dialogue, the prompt is the text and the answer is the
target + EOS. Left out on purpose: templates of our own for models that bring none.

    python data.py examples/questions.jsonl --model path/to/chat-model   # see both parts
"""

import functools
import json
import os
from dataclasses import replace

import jinja2  # comes with torch; chat templates are written in it

from engine import UserError, first_line
from messages import REASONING
from sources import Example, render_dialogue

SPACE = "\u2581"  # how SentencePiece-like tokenizers write the space that starts a word
MARK = "\N{SECTION SIGN}answer\N{SECTION SIGN}"  # stands for an answer in a probe of the template
# A template is a small program that runs on the data: it may fail like any other.
TEMPLATE_ERRORS = (
    jinja2.TemplateError,
    ValueError,
    TypeError,
    AttributeError,
    LookupError,
    ArithmeticError,
)


# ---------------------------------------------------------------------------------------- token ids


def encode_prompt(tokenizer, example: Example) -> list[int]:
    """Token ids of the prompt, with the BOS that the tokenizer wants, exactly once. Never empty.

    Raises UserError where the chat template refuses the dialogue.
    """
    if dialogue_of(tokenizer, example) is None:
        ids = _plain_ids(tokenizer, example.prompt)
    else:
        text, _ = split_dialogue(tokenizer, replace(example, target=""))
        ids = tokenizer(text, add_special_tokens=False).input_ids  # the template has written BOS
    if ids:
        return ids
    # Even an empty prompt needs a token from which the first response token is predicted.
    has_bos = tokenizer.bos_token_id is not None
    return [tokenizer.bos_token_id if has_bos else tokenizer.eos_token_id]


def cut_prompt(tokenizer, example: Example, ids: list[int], max_tokens: int) -> list[int]:
    """The ids of `encode_prompt`, at most `max_tokens` of them, cut on their left.

    BOS stays, and the system turn too, unless it leaves no room for the question.
    """
    if len(ids) <= max_tokens:
        return ids
    kept = closing = 0
    messages = dialogue_of(tokenizer, example) or example.messages
    if messages:
        turns = [i for i, message in enumerate(messages) if message["role"] != "system"] or [0]
        head, _ = _ids_around(tokenizer, example, messages, turns[0])  # BOS, the system turn
        kept = len(os.path.commonprefix([ids, head]))
        closing = len(_ids_around(tokenizer, example, messages, -1)[1])  # a mark, a header
    if kept + closing + 1 > max_tokens:
        kept = 0
    if kept == 0 and ids[0] == tokenizer.bos_token_id:
        kept = 1
    return ids[:kept] + ids[len(ids) - max_tokens + kept :]


def room_for_prompt(max_length: int, n_answer: int) -> int:
    """Tokens of a row that a prompt may take where no length of its own is set: it gives way to an
    answer of `n_answer` tokens, but never more than half of the row."""
    return max_length - min(n_answer, max_length // 2)


def _ids_around(
    tokenizer, example: Example, messages: list[dict], turn: int
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt before and after what message `turn` says. A mark in its place is
    found, where the words themselves may stand elsewhere too."""
    marked = list(messages)
    marked[turn] = {**messages[turn], "content": MARK}
    if dialogue_of(tokenizer, example) is None:
        text = render_dialogue(marked, example.template_args.get("tools"))
    else:
        arguments = example.template_args
        text = render(tokenizer, marked, arguments, add_generation_prompt=True)
    before, _, after = text.partition(MARK)
    return tuple(tokenizer(part, add_special_tokens=False).input_ids for part in (before, after))


def encode_demonstration(
    tokenizer, example: Example, max_tokens: int | None = None, ends: list[int] | None = None
) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, at most `max_tokens`, and of the complete answer with its end.

    With a chat template, the answer is what it writes after the prompt, up to the end of the turn.
    `ends` is `end_ids(tokenizer)`, for callers with many examples.
    """
    if dialogue_of(tokenizer, example) is None:
        prompt, answer = encode_prompt(tokenizer, example), encode_target(tokenizer, example.target)
    else:
        text, answer_text = split_dialogue(tokenizer, example)
        prompt = tokenizer(text, add_special_tokens=False).input_ids
        if ends is None:
            ends = end_ids(tokenizer)
        answer = _up_to_the_end(tokenizer, _ids_inside(tokenizer, answer_text), ends)
    if max_tokens is not None:
        prompt = cut_prompt(tokenizer, example, prompt, max_tokens)
    return prompt, answer


def _plain_ids(tokenizer, text: str) -> list[int]:
    bos = tokenizer.bos_token
    has_bos = bos is not None and text.startswith(bos)
    ids = tokenizer(text, add_special_tokens=not has_bos).input_ids
    if len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        if not text.endswith(tokenizer.eos_token):
            ids = ids[:-1]  # some tokenizers add EOS to every text; here a response follows
    return ids


def encode_target(tokenizer, text: str) -> list[int]:
    """Token ids of a complete response to a plain prompt, EOS at the end.

    SentencePiece-like tokenizers put a space before every text; if the text begins with a space
    too, one of the two is removed.
    """
    if text.startswith(" ") and _adds_space(tokenizer):
        text = text[1:]
    ids = tokenizer(text, add_special_tokens=False).input_ids
    return ids if ids[-1:] == [tokenizer.eos_token_id] else ids + [tokenizer.eos_token_id]


def _up_to_the_end(tokenizer, ids: list[int], ends: list[int]) -> list[int]:
    """The answer up to the token that ends it: sampling stops there, so nothing after it counts."""
    for i, token in enumerate(ids):
        if token in ends:
            return ids[: i + 1]
    if ids and is_special(tokenizer, ids[-1]):
        return ids  # a turn with another end, such as that of a tool call
    return ids + [tokenizer.eos_token_id]


def _ids_inside(tokenizer, text: str) -> list[int]:
    """Ids of a text that goes on after other text: no space is put before its first word."""
    if not _adds_space(tokenizer):
        return tokenizer(text, add_special_tokens=False).input_ids
    if text.startswith(" "):
        return tokenizer(text[1:], add_special_tokens=False).input_ids
    before = tokenizer("\n", add_special_tokens=False).input_ids
    ids = tokenizer("\n" + text, add_special_tokens=False).input_ids
    return ids[len(before) :]


def _adds_space(tokenizer) -> bool:
    return tokenizer.tokenize("a")[0].startswith(SPACE)


def decode(tokenizer, response: list[int]) -> str:
    """Text of a response, for rewards and for people. Training uses the ids.

    A model may have more ids than its tokenizer has tokens: such an id has no text.
    """
    options = dict(skip_special_tokens=True, clean_up_tokenization_spaces=False)
    try:
        text = tokenizer.decode(response, **options)
    except (ValueError, KeyError, IndexError, TypeError):  # of an id without a token (ByT5, ...)
        known = set(tokenizer.get_vocab().values())
        response = [token for token in response if token in known]
        text = tokenizer.decode(response, **options)
    if response and not text.startswith(" "):
        # Decoders remove the space before the first word, as at the beginning of a text.
        if (tokenizer.convert_ids_to_tokens(response[0]) or "").startswith(SPACE):
            return " " + text
    return text


# ---------------------------------------------------------------------------- the end of a response


def end_ids(tokenizer, lm=None) -> list[int]:
    """The ids that end a response, the tokenizer's EOS first.

    EOS, what `lm.generation_config` says (an id or several), and what the chat template writes at
    the end of a turn. Only ids that the tokenizer marks as special count.
    """
    ids = [tokenizer.eos_token_id]
    configured = getattr(getattr(lm, "generation_config", None), "eos_token_id", None)
    candidates = configured if isinstance(configured, list) else [configured]
    for token in (*candidates, turn_end(tokenizer)):
        if token is not None and token not in ids and is_special(tokenizer, token):
            ids.append(token)
    return ids


def turn_end(tokenizer) -> int | None:
    """The special token that the chat template writes at the end of an assistant's turn, if any.

    It is the last one that stands after the answer both in the middle of a dialogue and at its end;
    if the two differ, the last one at the end.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    asked = [{"role": "user", "content": "question"}, {"role": "assistant", "content": MARK}]
    try:
        last = render(tokenizer, asked).rpartition(MARK)[2]
    except UserError:
        return None  # a template that refuses the plainest dialogue; training will say so
    try:
        middle = render(tokenizer, [*asked, asked[0]]).partition(MARK)[2]
    except UserError:
        middle = last  # a template for one question and one answer
    for text in (os.path.commonprefix([last, middle]), last):
        ids = tokenizer(text, add_special_tokens=False).input_ids
        special = [token for token in ids if is_special(tokenizer, token)]
        if special:
            return special[-1]
    return None


def is_special(tokenizer, token: int) -> bool:
    """Does the tokenizer mark this id as special: a control token, no text?"""
    if token in tokenizer.all_special_ids:
        return True
    added = getattr(tokenizer, "added_tokens_decoder", {}).get(token)
    return added is not None and added.special


# -------------------------------------------------------------------------------- the chat template


def dialogue_of(tokenizer, example: Example) -> list[dict] | None:
    """The messages that the chat template is to write before the answer; None: plain text."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    if example.messages is not None:
        return example.messages
    return [{"role": "user", "content": example.prompt}] if example.is_chat else None


def reply_of(example: Example) -> dict:
    """The assistant's message that answers the prompt. A text that becomes one loses the spaces
    around it; what the data hold as a message stays as it is."""
    if example.reply is not None:
        return example.reply
    content = example.target.strip() if example.is_chat else example.target
    return {"role": "assistant", "content": content}


def split_dialogue(tokenizer, example: Example) -> tuple[str, str]:
    """What the template writes for the dialogue up to the answer, and for the answer ("": none).

    Raises UserError where the template refuses the dialogue, drops a part of it, or writes the
    turns before an answer differently once an answer follows.
    """
    messages, arguments = dialogue_of(tokenizer, example), example.template_args
    try:
        opening = _opening(tokenizer, messages, arguments)
        if not example.target:
            return opening, ""
        reply = reply_of(example)
        whole = render(tokenizer, [*messages, reply], arguments)
        if not whole.startswith(opening):
            raise UserError(
                "the template begins this answer with another header than its prompt has; "
                "--template-args may ask for the same"
            )
        answer = whole[len(opening) :]
        if reply["content"].rpartition("</think>")[2].strip() not in answer:
            raise UserError("the template does not write the answer as it is")
    except UserError as problem:
        dialogue = f"the model's chat template refuses the dialogue {example.prompt[:80]!r}"
        where = f"{example.place}: " if example.place else ""
        raise UserError(f"{where}{dialogue}: {problem}") from None
    return opening, answer


def _opening(tokenizer, messages: list[dict], arguments: dict) -> str:
    """The text up to the place where any answer begins."""
    opening = render(tokenizer, messages, arguments, add_generation_prompt=True)
    marked = render(tokenizer, [*messages, {"role": "assistant", "content": MARK}], arguments)
    if not marked.startswith(opening):
        # Some templates ask for an answer with words that they do not write before one that is
        # there (`<think>`): the answer begins where the two texts part.
        opening = os.path.commonprefix([opening, marked])
        if not opening.startswith(render(tokenizer, messages, arguments)):
            raise UserError("the template writes the turns before an answer differently with it")
    if MARK not in marked[len(opening) :]:
        raise UserError("the template does not write the answer")
    return opening


def render(tokenizer, messages: list[dict], arguments: dict | None = None, **options) -> str:
    """What the template writes. `arguments`: its own keyword arguments, such as `tools`.

    Contents are strings and the arguments of tool calls are objects; a template that needs parts
    or strings instead gets them. Raises UserError where it fails, or where its text lacks what the
    system or the user said, or the tool calls.
    """
    options = dict(tokenize=False, **options, **(arguments or {}))
    write = functools.partial(tokenizer.apply_chat_template, **options)
    in_parts = [_content_as_parts(message) for message in messages]
    forms = [messages, in_parts]
    if any(message.get("tool_calls") for message in messages):
        forms.insert(1, [_arguments_as_text(message) for message in messages])
    reasons = []
    for form in forms:
        try:
            text = write(form)
            missing = _missing(text, messages)
            if missing is None and len(forms) == 3:
                without_calls = [{**message, "tool_calls": None} for message in form]
                missing = "tool calls" if write(without_calls) == text else None
        except TEMPLATE_ERRORS as problem:
            reasons.append(first_line(problem))
            continue
        if missing is None and any(message["role"] == "tool" for message in messages):
            marked = [{**m, "content": MARK} if m["role"] == "tool" else m for m in messages]
            missing = None if MARK in _try(write, marked) else "what a tool said"
        # A template that does not read parts may write them as they are in Python.
        if missing is None and not any(f"{m['content']!r}" in text for m in in_parts):
            return text
        reasons.append(f"the template does not write {missing}")
    raise UserError(reasons[0])


def _try(write, messages: list[dict]) -> str:
    try:
        return write(messages)
    except TEMPLATE_ERRORS:
        return MARK  # it reads the content, and not any text will do


def _missing(text: str, messages: list[dict]) -> str | None:
    """Whose words the text lacks."""
    for message in messages:
        if message["role"] in ("system", "user") and message["content"].strip() not in text:
            return f"what the {message['role']} said"
    return None


def _content_as_parts(message: dict) -> dict:
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _arguments_as_text(message: dict) -> dict:
    calls = []
    for call in message.get("tool_calls") or []:
        function = dict(call.get("function", call))
        function["arguments"] = json.dumps(function.get("arguments"), ensure_ascii=False)
        calls.append({**call, "function": function})
    return {**message, "tool_calls": calls} if calls else message


def words_of_its_own(tokenizer) -> str:
    """What the chat template says before a dialogue that has no system turn; "" if nothing.

    It is what stands before the first turn of the user and not before a later one, without control
    tokens. One or two words are a header.
    """
    user = {"role": "user", "content": MARK}
    try:
        first = render(tokenizer, [user]).partition(MARK)[0]
        later = render(tokenizer, [user, {"role": "assistant", "content": "answer"}, user])
    except UserError:
        return ""  # a template that refuses the plainest dialogue; training will say so
    header = os.path.commonprefix([first[::-1], later.rpartition(MARK)[0][::-1]])
    own = first[: len(first) - len(header)]
    for token in tokenizer.all_special_tokens:
        own = own.replace(token, " ")
    words = own.split()
    return " ".join(words) if len(words) > 2 else ""


def unwritten(tokenizer, example: Example) -> list[str]:
    """What the data say and the model does not read: of `tools` and reasoning."""
    missing = []
    if dialogue_of(tokenizer, example) is None:
        prompt, answer = example.prompt, example.target
    else:
        prompt, answer = split_dialogue(tokenizer, example)
        arguments = {**example.template_args, "tools": None}
        without = replace(example, template_args=arguments, target="")
        if example.template_args.get("tools") and split_dialogue(tokenizer, without)[0] == prompt:
            missing.append("tools")
    for name, thought in reasoning_of(example):
        if thought.strip() not in answer:
            missing.append(name)
    return missing


def control_words(tokenizer, example: Example) -> list[str]:
    """Special tokens of the tokenizer in the words of the data: they are read as such."""
    texts = [message["content"] for message in dialogue_of(tokenizer, example) or []]
    text = "\n".join([*texts, example.target] if texts else [example.prompt, example.target])
    return [token for token in tokenizer.all_special_tokens if token in text]


def reasoning_of(example: Example) -> list[tuple[str, str]]:
    """What was thought before the answer: (name of the field, text)."""
    reply = example.reply or {"content": example.target}
    found = [(name, reply.get(name)) for name in REASONING]
    thought, closed, _ = reply["content"].rpartition("</think>")
    if closed:
        found.append(("<think>", thought.partition("<think>")[2]))
    return [(name, text) for name, text in found if isinstance(text, str) and text.strip()]
