"""Episodes of several turns: policy, user, policy, ... in one row, a response span for each turn.

    column          0    1    2    3    4    5    6    7    8    9
    input_ids       q0   q1   r0   r1  EOS   u0   u1   r2  EOS  PAD
    response_mask   0    0    1    1    1    0    0    1    1    0

This is one episode: GAE skips the columns of the user's turn. Ordinary PPO has episodes of one turn
and runs the same code. The tokens between two turns come from the model's chat template, or from
the plain one of `render_dialogue`; sampled token ids stay as they are: the text of a whole dialogue
is never tokenised again. The user is scripted (by the later user turns of the record) or a model
(`--user-model`). Left out on purpose: tools, more than two speakers.

    python train.py --data examples/questions.jsonl --turns 2 --ppo-ratio 1 --reward length
"""

import argparse
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from chat import MARK, cut_prompt, dialogue_of, end_ids, is_special, render, turn_end
from data import Example, columns_of, decode, encode_prompt, plain_reply, render_dialogue
from engine import UserError
from generate import sample
from hybrid import HybridModel

OTHER_MARK = "\N{PILCROW SIGN}reply\N{PILCROW SIGN}"  # stands for what the user says


@dataclass
class Episode:
    """One dialogue: its row so far, and lists with an entry for each turn of the policy."""

    example: Example
    messages: list[dict]
    ids: list[int]
    response_mask: list[bool]
    histories: list[str] = field(default_factory=list)  # what was said before, as rewards read it
    responses: list[str] = field(default_factory=list)
    replies: list[str] = field(default_factory=list)  # of the user, each after a response
    logprobs: list[float] = field(default_factory=list)  # the sampler's, of each sampled token
    ends: list[int] = field(default_factory=list)  # column of the turn's last token
    truncated: list[bool] = field(default_factory=list)  # did it hit the length limit?

    def text(self) -> str:
        """Everything after the prompt, with the user's turns: the completion of a dialogue."""
        text = self.responses[0]
        for reply, response in zip(self.replies, self.responses[1:]):
            text += plain_reply(reply) + response
        return text


def sample_episodes(
    model: HybridModel,
    tokenizer,
    examples: list[Example],
    *,
    turns: int = 1,
    user=None,
    max_length: int,
    max_new_tokens: int,
    **options,
) -> list[Episode]:
    """Sample one episode for each example: up to `turns` responses.

    There are fewer where the user has no more to say or the row is full. More than one turn needs
    `user(episodes, generator) -> list[str | None]`, which answers the dialogues; `options` are
    those of `generate`.
    """
    episodes = []
    for example in examples:
        ids = encode_prompt(tokenizer, example)
        ids = cut_prompt(tokenizer, example, ids, max_length - turns * max_new_tokens)
        messages = example.messages or [{"role": "user", "content": example.prompt}]
        episodes.append(Episode(example, list(messages), ids, [False] * len(ids)))
    ends = end_ids(tokenizer, model.lm)
    options |= dict(max_new_tokens=max_new_tokens, eos_token_id=ends)
    speaking = episodes
    for turn in range(turns):
        if turn > 0:
            replies = user(speaking, options.get("generator"))
            speaking = _add_replies(tokenizer, speaking, replies, max_length - max_new_tokens)
        if not speaking:
            break
        generation = sample(model, [episode.ids for episode in speaking], **options)
        for episode, response, logprobs in zip(speaking, generation.responses, generation.logprobs):
            _add_response(tokenizer, episode, response, logprobs, ends)
    return episodes


def _add_response(
    tokenizer, episode: Episode, ids: list[int], logprobs: list[float], ends: list[int]
) -> None:
    is_first = not episode.responses
    history = episode.example.prompt if is_first else render_dialogue(episode.messages)
    episode.histories.append(history)
    episode.responses.append(decode(tokenizer, ids))
    episode.messages.append({"role": "assistant", "content": episode.responses[-1]})
    episode.ids = episode.ids + ids
    episode.response_mask += [True] * len(ids)
    episode.logprobs += logprobs
    episode.ends.append(len(episode.ids) - 1)
    episode.truncated.append(ids[-1] not in ends)


def _add_replies(
    tokenizer, episodes: list[Episode], replies: list[str | None], limit: int
) -> list[Episode]:
    """Append the replies. -> the episodes that continue, with at most `limit` tokens."""
    continued = []
    for episode, reply in zip(episodes, replies):
        if reply is None:
            continue
        text = text_between(tokenizer, episode, reply)
        ids = tokenizer(text, add_special_tokens=False).input_ids
        if len(episode.ids) + len(ids) <= limit:
            episode.messages.append({"role": "user", "content": reply})
            episode.replies.append(reply)
            episode.ids = episode.ids + ids
            episode.response_mask += [False] * len(ids)
            continued.append(episode)
    return continued


def text_between(tokenizer, episode: Episode, reply: str) -> str:
    """The text between the policy's last token and its next one.

    That is the end of its turn, the user's turn, and the header of its next turn. The end of the
    turn is left out where the policy has written one: it must not be there twice.
    """
    example = episode.example
    if dialogue_of(tokenizer, example) is None:
        return plain_reply(reply)
    # The mark replaces the response, whose own tokens are in the row already.
    marked = {"role": "assistant", "content": MARK}
    messages = [*episode.messages[:-1], marked]
    said = [{"role": "user", "content": content} for content in (reply, OTHER_MARK)]
    text, text_of_mark = [
        render(tokenizer, [*messages, turn], example.template_args, add_generation_prompt=True)
        for turn in said
    ]
    text = text.rpartition(MARK)[2]
    if episode.truncated[-1]:
        return text
    end_of_turn = text_of_mark.rpartition(MARK)[2].partition(OTHER_MARK)[0]
    end_of_turn = tokenizer(end_of_turn, add_special_tokens=False).input_ids
    written = turn_end(tokenizer)
    ends = [token for token in (episode.ids[-1], written) if token in end_of_turn]
    if not ends and written is not None:
        # The template ends a turn inside a dialogue with another token than the last turn.
        ends = [token for token in end_of_turn if is_special(tokenizer, token)]
    if not ends:
        return text
    return text.partition(tokenizer.convert_ids_to_tokens(ends[0]))[2]


# ---------------------------------------------------------------------------- what the reward says


class Scores(NamedTuple):
    """n numbers, each about one response: the only one of its row, or one turn of a dialogue."""

    values: torch.Tensor  # (n,) float32, NaN where a judge gave no answer
    rows: torch.Tensor  # (n,) long, the row of the response
    columns: torch.Tensor  # (n,) long, its last token


def score_episodes(episodes: list[Episode], reward, turn_rewards: bool, device) -> Scores:
    """Ask the reward about every response: about whole dialogues, or about each turn of them."""
    rows, prompts, completions, columns = [], [], [], []
    before, after = [], []  # prompts and completions as messages
    for row, episode in enumerate(episodes):
        said = len(episode.responses) + len(episode.replies)
        first = len(episode.messages) - said  # the index of the first response
        if turn_rewards:  # a response, given what was said before it
            prompts += episode.histories
            completions += episode.responses
            columns += episode.ends
            rows += [row] * len(episode.responses)
            turns = range(first, len(episode.messages), 2)
            before += [episode.messages[:turn] for turn in turns]
            after += [[episode.messages[turn]] for turn in turns]
        else:  # all that was said after the prompt
            prompts.append(episode.example.prompt)
            completions.append(episode.text())
            columns.append(episode.ends[-1])
            rows.append(row)
            before.append(episode.messages[:first])
            after.append(episode.messages[first:])
    fields = columns_of([episodes[row].example for row in rows])
    fields |= {"prompt_messages": before, "completion_messages": after}
    values = reward(prompts, completions, **fields).to(device)  # (n,)
    return Scores(values, torch.tensor(rows, device=device), torch.tensor(columns, device=device))


def with_penalties(scores: Scores, episodes: list[Episode], penalty: float) -> Scores:
    """The scores (0 where there is none), and -penalty for each truncated response."""
    truncated = []  # (row, column) of the last token
    for row, episode in enumerate(episodes):
        ends = zip(episode.ends, episode.truncated)
        truncated += [(row, column) for column, hit_the_limit in ends if hit_the_limit]
    positions = torch.tensor(truncated, dtype=torch.long, device=scores.rows.device).view(-1, 2)
    costs = torch.full((len(truncated),), -penalty, device=scores.rows.device)  # (c,)
    both = zip((scores.values.nan_to_num(0), scores.rows, scores.columns), (costs, *positions.T))
    return Scores(*[torch.cat(pair) for pair in both])


# ------------------------------------------------------------------------------- who plays the user


def scripted_user(episodes: list[Episode], generator=None) -> list[str | None]:
    """The next user turn of each record, whatever the policy says; None after the last one."""
    replies = []
    for episode in episodes:
        turns, turn = episode.example.user_turns, len(episode.responses) - 1
        replies.append(turns[turn] if turn < len(turns) else None)
    return replies


class ModelUser:
    """A language model that plays the user, by the plain template.

    Its turn ends at EOS or an empty line. An empty turn (None) ends the dialogue.
    """

    def __init__(self, model: HybridModel, tokenizer, max_new_tokens: int):
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens

    def __call__(
        self, episodes: list[Episode], generator: torch.Generator | None = None
    ) -> list[str | None]:
        room = self.model.max_positions - self.max_new_tokens
        prompts = []
        for episode in episodes:
            text = render_dialogue(episode.messages).removesuffix("Assistant:\n") + "User:\n"
            prompts.append(encode_prompt(self.tokenizer, Example(text, ""))[-room:])
        options = dict(max_new_tokens=self.max_new_tokens, generator=generator)
        options["eos_token_id"] = end_ids(self.tokenizer, self.model.lm)
        responses = sample(self.model, prompts, **options).responses
        texts = [decode(self.tokenizer, response) for response in responses]
        return [text.split("\n\n")[0].strip() or None for text in texts]


# ----------------------------------------------------------------------------------------- in a run


def check_flags(args: argparse.Namespace) -> None:
    """Raises UserError for flags that do not go together; --max-length is known by now."""
    check_turns(args)
    if args.turns > 1 and (args.schedule in ("gate", "buffer") or args.hints is not None):
        raise UserError("--turns above 1 goes with --schedule ratio or mix, and without --hints")


def check_turns(args: argparse.Namespace) -> None:
    """The checks of `check_flags` that need no training."""
    if args.turns == 1 and (args.turn_rewards or args.user_model):
        raise UserError("--turn-rewards and --user-model are for dialogues: give --turns above 1")
    if args.turns * args.max_new_tokens >= args.max_length:
        lengths = f"--turns {args.turns} of --max-new-tokens {args.max_new_tokens}"
        room = f"no room for a prompt in --max-length {args.max_length}"
        raise UserError(f"{lengths} leave {room}")


def check_replies(args: argparse.Namespace, examples: list[Example], source: str) -> None:
    """Raises UserError where nobody answers the policy; `source` is what --data names."""
    has_user = args.user_model is not None or any(e.user_turns for e in examples)
    if args.turns > 1 and not has_user:
        raise UserError(
            f"--turns {args.turns}: nothing in --data {source} says what the user replies; "
            "give 'messages' or 'turns', or a --user-model"
        )


def load_user(args: argparse.Namespace, device: torch.device):
    """`scripted_user`, or the --user-model. Raises UserError where its context is too short."""
    if args.user_model is None:
        return scripted_user
    model, tokenizer = HybridModel.load(args.user_model, "--user-model")
    if args.max_new_tokens >= model.max_positions:
        context = f"has a context of {model.max_positions} tokens"
        need = f"no room for a dialogue and --max-new-tokens {args.max_new_tokens}"
        raise UserError(f"--user-model {args.user_model} {context}, {need}")
    return ModelUser(model.to(device).eval(), tokenizer, args.max_new_tokens)
