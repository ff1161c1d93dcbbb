"""Episodes of several turns: policy, user, policy, ... in one row, with one response span for each turn of the policy.

    column          0    1    2    3    4    5    6    7    8    9
    input_ids       q0   q1   r0   r1  EOS   u0   u1   r2  EOS  PAD
    response_mask   0    0    1    1    1    0    0    1    1    0        one episode: GAE passes over the user's turn

One turn is the ordinary PPO episode, and takes the same path. Between turns stands what the model's chat template writes there, or the plain one of
`data.render_dialogue`; token ids that were sampled stay as they are, the text of a whole dialogue is never tokenised again.
The user is scripted (the user turns that the record goes on with) or a model (`--user-model`). Left out on purpose: tools, more than two speakers.

    python train.py --data questions.jsonl --turns 2 --ppo-ratio 1 --reward "length(target=20)"
"""

from dataclasses import dataclass, field

import torch

from data import Example, decode, encode_prompt, plain_reply, render_dialogue
from generate import sample
from hybrid import HybridModel


@dataclass
class Episode:
    """One dialogue as it grows. `ids` and `response_mask` are the row and its response mask; the lists below have an entry for each turn of the policy."""

    example: Example
    messages: list[dict]
    ids: list[int]
    response_mask: list[bool]
    histories: list[str] = field(default_factory=list)  # what was said before, as rewards read it
    responses: list[str] = field(default_factory=list)
    logprobs: list[float] = field(
        default_factory=list
    )  # of the policy's tokens, all turns, as the sampler saw them
    ends: list[int] = field(default_factory=list)  # column of the turn's last token
    truncated: list[bool] = field(default_factory=list)  # did it hit the length limit?

    def text(self) -> str:
        """Everything after the prompt, the user's turns included: the completion of a whole dialogue."""
        parts = [self.responses[0]]
        for i in range(1, len(self.responses)):
            said = self.messages[2 * (i - len(self.responses))][
                "content"
            ]  # the last message is the last response
            parts += [plain_reply(said), self.responses[i]]
        return "".join(parts)


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
    """Sample one episode for each example: up to `turns` responses, fewer where the user has no more to say or the row is full.

    `user(episodes, generator) -> list[str | None]` answers the dialogues, and is needed for more than one turn; `options` are those of `generate`.
    """
    episodes = []
    for example in examples:
        ids = encode_prompt(tokenizer, example)[-(max_length - turns * max_new_tokens) :]
        episodes.append(
            Episode(
                example,
                list(example.messages or [{"role": "user", "content": example.prompt}]),
                ids,
                [False] * len(ids),
            )
        )
    speaking = episodes
    for turn in range(turns):
        if turn:
            speaking = [
                e
                for e, said in zip(speaking, user(speaking, options.get("generator")))
                if said is not None and _ask(tokenizer, e, said, max_length - max_new_tokens)
            ]
        if not speaking:
            break
        generation = sample(
            model,
            [e.ids for e in speaking],
            max_new_tokens=max_new_tokens,
            eos_token_id=tokenizer.eos_token_id,
            **options,
        )
        for episode, response, logprobs in zip(speaking, generation.responses, generation.logprobs):
            episode.histories.append(
                render_dialogue(episode.messages) if turn else episode.example.prompt
            )
            episode.responses.append(decode(tokenizer, response))
            episode.messages.append({"role": "assistant", "content": episode.responses[-1]})
            episode.ids = episode.ids + response
            episode.response_mask += [True] * len(response)
            episode.logprobs += logprobs
            episode.ends.append(len(episode.ids) - 1)
            episode.truncated.append(response[-1] != tokenizer.eos_token_id)
    return episodes


def _ask(tokenizer, episode: Episode, said: str, limit: int) -> bool:
    """Append the user's turn, unless the row would exceed `limit` tokens. -> was there room?"""
    ids = tokenizer(text_between(tokenizer, episode, said), add_special_tokens=False).input_ids
    if len(episode.ids) + len(ids) > limit:
        return False
    episode.messages.append({"role": "user", "content": said})
    episode.ids = episode.ids + ids
    episode.response_mask += [False] * len(ids)
    return True


def text_between(tokenizer, episode: Episode, said: str) -> str:
    """What stands between the policy's last token and its next one: the end of its turn, the user's turn, the header of the next."""
    if episode.example.messages is None or not tokenizer.chat_template:
        return plain_reply(said)
    mark = "\N{SECTION SIGN}response\N{SECTION SIGN}"  # stands for the response, whose own tokens are in the row already
    messages = [
        *episode.messages[:-1],
        {"role": "assistant", "content": mark},
        {"role": "user", "content": said},
    ]
    text = tokenizer.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    ).rsplit(mark, 1)[1]
    before_eos, _, after_eos = text.partition(tokenizer.eos_token)
    return (
        after_eos if not episode.truncated[-1] and not before_eos.strip() else text
    )  # EOS was sampled: it is not said twice


def scripted_user(episodes: list[Episode], generator=None) -> list[str | None]:
    """The user turns that the record itself goes on with, whatever the policy has answered; None when they are used up."""
    return [
        e.example.user_turns[n] if n < len(e.example.user_turns) else None
        for e in episodes
        for n in [len(e.responses) - 1]
    ]


class ModelUser:
    """A language model that plays the user, by the plain template; its turn ends at EOS or an empty line."""

    def __init__(self, model: HybridModel, tokenizer, max_new_tokens: int):
        self.model, self.tokenizer, self.max_new_tokens = model, tokenizer, max_new_tokens

    def __call__(
        self, episodes: list[Episode], generator: torch.Generator | None = None
    ) -> list[str | None]:
        texts = [
            render_dialogue(e.messages).removesuffix("Assistant:\n") + "User:\n" for e in episodes
        ]
        room = self.model.max_positions - self.max_new_tokens
        prompts = [encode_prompt(self.tokenizer, Example(text, ""))[-room:] for text in texts]
        options = dict(
            max_new_tokens=self.max_new_tokens,
            eos_token_id=self.tokenizer.eos_token_id,
            generator=generator,
        )
        said = [
            decode(self.tokenizer, response).split("\n\n")[0].strip()
            for response in sample(self.model, prompts, **options).responses
        ]
        return [text or None for text in said]


def add_flags(parser):
    from engine import number

    group = parser.add_argument_group("dialogue")
    group.add_argument("--turns", type=number(int, 1), default=1, help="x")
    group.add_argument("--user-model", help="x")
    group.add_argument("--turn-rewards", action="store_true", help="x")


def check_flags(args):
    from engine import UserError

    if args.turns == 1 and (args.turn_rewards or args.user_model):
        raise UserError("--turn-rewards and --user-model are for dialogues: give --turns above 1")
    if args.turns > 1 and args.schedule in ("gate", "buffer"):
        raise UserError("--turns above 1 goes with --schedule ratio or mix")
    if args.turns * args.max_new_tokens >= args.max_length:
        raise UserError(
            f"--turns {args.turns} of --max-new-tokens {args.max_new_tokens} leave no room for a prompt in --max-length {args.max_length}"
        )


def load_user(args, device):
    from engine import UserError

    if args.user_model is None:
        return scripted_user
    user_model, user_tokenizer = HybridModel.load(args.user_model, "--user-model")
    if args.max_new_tokens >= user_model.max_positions:
        raise UserError(
            f"--user-model {args.user_model} has a context of {user_model.max_positions} tokens, no room for a dialogue and --max-new-tokens {args.max_new_tokens}"
        )
    return ModelUser(user_model.to(device).eval(), user_tokenizer, args.max_new_tokens)
