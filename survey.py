"""What a model reads of the data, before it is trained on them: refused, cut, unwritten, shown.

Nothing here changes a text. `train.py` says in counts what a run will not learn from; `data.py`
shows records as the model reads them. Left out on purpose: statistics that no decision needs.

    python data.py examples/questions.jsonl --model path/to/chat-model
"""

from collections import Counter
from collections.abc import Callable

from tqdm import tqdm

from chat import (
    control_words,
    cut_prompt,
    dialogue_of,
    encode_demonstration,
    encode_prompt,
    end_ids,
    split_dialogue,
    unwritten,
    words_of_its_own,
)
from cli import bar_pace
from engine import UserError, visible
from sources import Example, Pair

MOST = 2000  # examples whose tokens are counted; more would only make the start slow
WORTH_SAYING = 0.01  # a share of cut rows above this is said
OFTEN = 0.1  # a share of answers that no response can be as long as, above this, is said


# --------------------------------------------------------------------------------- what is left out


def writable(tokenizer, examples: list[Example], strict: bool, say: Callable) -> list[Example]:
    """The examples whose dialogue the chat template writes; `say` hears about the others.

    `strict` raises UserError at the first of them. It is raised too if no example is left.
    """

    def check(example: Example) -> None:
        if dialogue_of(tokenizer, example) is not None:
            split_dialogue(tokenizer, example)

    return kept(examples, check, strict, say)


def comparable(
    tokenizer, pairs: list[Pair], limits: dict[str, int], strict: bool, say: Callable
) -> list[Pair]:
    """The pairs whose sides the template writes, and which still differ once they are cut.

    `limits`: max_length and max_prompt_length. `strict` as in `writable`.
    """
    ends = end_ids(tokenizer)

    def check(pair: Pair) -> None:
        chosen, rejected = [
            rows_of(tokenizer, side, **limits, ends=ends)[1] for side in pair.sides()
        ]
        if chosen == rejected:
            length = f"--max-length {limits['max_length']}"
            raise UserError(f"{pair.place}: both responses are the same once cut to {length}")

    return kept(pairs, check, strict, say)


def kept(records: list, check: Callable, strict: bool, say: Callable) -> list:
    """The examples or pairs for which `check` raises no UserError; `say` hears about the others.

    `strict` raises the first error. It is raised too if no record is left.
    """
    fine, reasons, first = [], {}, None  # reasons: text -> places
    for record in tqdm(
        records, desc="checking the data", leave=False, delay=2, mininterval=bar_pace()
    ):
        try:
            check(record)
            fine.append(record)
        except UserError as problem:
            if strict:
                raise
            first = first or problem
            reasons.setdefault(str(problem).rpartition(": ")[2], []).append(record.place)
    if first is not None and not fine:
        raise first
    for reason, places in reasons.items():
        where = f" (first: {places[0]})" if places[0] else ""
        say(f"note: {len(places)} of {len(records)} examples are left out: {reason}{where}")
    return fine


# -------------------------------------------------------------------------------------- what is cut


def rows_of(
    tokenizer, example: Example, max_length: int, max_prompt_length: int, ends: list[int]
) -> tuple[list[int], list[int]]:
    """Prompt and answer ids of an example as they are trained; an answer that is absent is []."""
    if not example.target:
        ids = encode_prompt(tokenizer, example)
        return cut_prompt(tokenizer, example, ids, max_prompt_length), []
    prompt, answer = encode_demonstration(tokenizer, example, max_prompt_length, ends)
    return prompt, answer[: max_length - len(prompt)]


def lengths_of(tokenizer, examples: list[Example]) -> list[tuple[int, int]]:
    """Tokens of prompt and answer, before any cut, of at most MOST examples evenly spread."""
    ends = end_ids(tokenizer)
    return [_length_of(tokenizer, example, ends) for example in spread(examples)]


def pair_lengths(tokenizer, pairs: list[Pair]) -> list[list[tuple[int, int]]]:
    """The same of both sides of at most MOST pairs."""
    ends = end_ids(tokenizer)
    return [[_length_of(tokenizer, side, ends) for side in pair.sides()] for pair in spread(pairs)]


def _length_of(tokenizer, example: Example, ends: list[int]) -> tuple[int, int]:
    prompt, answer = rows_of(tokenizer, example, 10**9, 10**9, ends)
    return len(prompt), len(answer)


def spread(records: list) -> list:
    """At most MOST of the records, at even distances."""
    if len(records) <= MOST:
        return records
    return [records[i * len(records) // MOST] for i in range(MOST)]


def say_read(
    tokenizer,
    examples: list[Example],
    limits: dict[str, int],
    say: Callable,
    pairs: list[Pair] = (),
) -> None:
    """Say what of the examples and pairs the model will not read as it stands in the data."""
    both = pair_lengths(tokenizer, pairs)
    say_cuts(lengths_of(tokenizer, examples), **limits, say=say, pairs=both)
    sides = [side for pair in pairs for side in pair.sides()]
    say_unwritten(tokenizer, examples + sides, say)


def say_cuts(
    lengths: list[tuple[int, int]],
    max_length: int,
    max_prompt_length: int,
    say: Callable,
    pairs: list[list[tuple[int, int]]] = (),
) -> None:
    """Say how many rows are cut, if it is more than one in a hundred, and how many answers are
    longer than any response of the run, if it is more than one in ten. A pair has one prompt and
    two answers."""
    prompts = [prompt for prompt, _ in lengths]
    prompts += [max(prompt for prompt, _ in pair) for pair in pairs]
    long_prompts = [prompt for prompt in prompts if prompt > max_prompt_length]
    lengths = lengths + [side for pair in pairs for side in pair]
    long_answers = []
    for prompt, answer in lengths:
        if min(prompt, max_prompt_length) + answer > max_length:
            long_answers.append(prompt + answer)
    n, n_answers = len(prompts), sum(answer > 0 for _, answer in lengths)
    if len(long_prompts) > WORTH_SAYING * n:
        say(
            f"note: {len(long_prompts)} of {n} prompts are cut on their left to "
            f"{max_prompt_length} tokens (--max-length less --max-new-tokens); the longest has "
            f"{max(long_prompts)}"
        )
    if len(long_answers) > WORTH_SAYING * n_answers:
        say(
            f"note: {len(long_answers)} of {n_answers} answers are cut on their right and get no "
            f"EOS; --max-length {max(long_answers)} would keep the longest, {max_length} is set"
        )
    room = max_length - max_prompt_length  # for what is sampled
    longer = [answer for _, answer in lengths if answer > room]
    if len(longer) > OFTEN * n_answers:
        say(
            f"note: {len(longer)} of {n_answers} answers are longer than any response that is "
            f"sampled: --max-new-tokens leaves {room} tokens, the longest answer has {max(longer)}"
        )


def say_unwritten(tokenizer, examples: list[Example], say: Callable) -> None:
    """Say what the data hold and the template does not write, and what it writes unasked."""
    looked_at = spread(examples)
    counts = Counter(name for example in looked_at for name in unwritten(tokenizer, example))
    for name, count in counts.items():
        say(
            f"note: in {count} of {len(looked_at)} examples '{name}' is not written for the model, "
            "so it does not read it"
        )
    spelled = [words for words in (control_words(tokenizer, e) for e in looked_at) if words]
    if spelled:
        say(
            f"note: {len(spelled)} of {len(looked_at)} examples hold a control token of the model "
            f"in their words, such as {spelled[0][0]}: it is read as such, and may end an answer"
        )
    dialogues = [dialogue_of(tokenizer, example) for example in examples]
    asked = [e for e, turns in zip(examples, dialogues) if e.messages is None and turns is not None]
    if asked:
        say(
            f"note: {len(asked)} of {len(examples)} examples are plain prompts: the model's chat "
            "template writes each as a question, and its target as the answer (--raw: plain text)"
        )
    say_own_words(tokenizer, dialogues, say)
    say_touching([e for e, turns in zip(examples, dialogues) if turns is None], say)


def say_own_words(tokenizer, dialogues: list[list[dict] | None], say: Callable) -> None:
    """Say where the template writes a system turn that the data do not have. `dialogues` has what
    the template writes of each example; None: nothing."""
    without = [turns for turns in dialogues if turns and turns[0]["role"] != "system"]
    words = words_of_its_own(tokenizer) if without else ""
    if words:
        say(
            f"note: {len(without)} of {len(dialogues)} examples have no system turn, and the "
            f"model's chat template writes its own before them: {words[:100]!r}"
        )


def say_touching(examples: list[Example], say: Callable) -> None:
    """Say where a plain prompt and its target are joined without a space or line break."""
    touching = [example for example in examples if touches(example)]
    if touching:
        text = (touching[0].prompt + touching[0].target)[:60]
        say(
            f"note: in {len(touching)} of {len(examples)} examples prompt and target touch, as in "
            f"{text!r}: end one or begin the other with a space or line break"
        )


def say_shared(train: list[Example], held_out: list[Example], say: Callable) -> None:
    """Say how many held-out examples are trained on too, where there are not enough prompts."""
    trained = {(example.prompt, example.target) for example in train}
    shared = [example for example in held_out if (example.prompt, example.target) in trained]
    if shared:
        say(
            f"note: {len(shared)} of {len(held_out)} held-out examples are trained on too: there "
            "are too few different ones to hold any out"
        )


def touches(example: Example) -> bool:
    """Does the target begin with a letter or digit directly after the last word of the prompt?"""
    if example.messages is not None:
        return False
    last, first = example.prompt[-1:], example.target[:1]
    return bool(last.strip()) and first.isascii() and first.isalnum()


# ------------------------------------------------------------------------------------ what it reads


def show(tokenizer, example: Example, max_length: int, max_prompt_length: int) -> str:
    """The row of an example as the model reads it, in lines; those after `>` are trained."""
    ends = end_ids(tokenizer)
    whole = rows_of(tokenizer, example, 10**9, 10**9, ends)
    row = rows_of(tokenizer, example, max_length, max_prompt_length, ends)
    counts = []
    for name, ids, kept in zip(("prompt", "answer"), whole, row):
        cut = f", {len(ids) - len(kept)} cut" if len(kept) < len(ids) else ""
        counts.append(f"{name} {len(kept)} tokens{cut}")
    lines = [f"{example.place or 'an example'}: {', '.join(counts)}"]
    prompt = as_read(tokenizer, row[0]).removesuffix("\n")  # the answer begins a line anyway
    lines += [f"    {visible(line)}" for line in prompt.split("\n")]
    if example.target:
        lines += [f"  > {visible(line)}" for line in as_read(tokenizer, row[1]).split("\n")]
    return "\n".join(lines)


def as_read(tokenizer, ids: list[int]) -> str:
    """The text of token ids, control tokens included."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
