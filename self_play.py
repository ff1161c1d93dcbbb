"""Self-play: a response is worth the probability that it beats the response of an earlier self to the same prompt.

    self_play(base, opponent="snapshot", every=50, shape="win")            as part of a --reward expression; `base` is any expression

The opponent is frozen: the policy as it was when the last `every` PPO steps began, or the KL reference (`opponent="reference"`). `base` judges both
responses, and the shaped reward is

    win        1 if ours scores higher, 0 if lower, 1/2 for a tie
    sigmoid    sigmoid(ours - theirs), the Bradley-Terry probability of winning
    margin     ours - theirs

Nothing can be gained by standing still: against an equal opponent every shape is worth its value at a tie, on average (1/2, 1/2, 0).
Left out on purpose: leagues of opponents, Elo.

    python train.py --reward "self_play(sentiment, every=20)"
"""

import torch

import parallel
from data import Example, decode, encode_prompt
from generate import sample
from hybrid import HybridModel


class SelfPlay:
    """The opponent of one `self_play(...)`. `context`: policy (HybridModel), tokenizer, sampling (max_length, max_new_tokens, temperature), examples."""

    def __init__(
        self, context: dict, opponent: str = "snapshot", every: int = 50, shape: str = "win"
    ):
        if (
            opponent not in ("snapshot", "reference")
            or shape not in ("win", "sigmoid", "margin")
            or not isinstance(every, int)
            or every < 1
        ):
            raise ValueError(
                'opponent is "snapshot" or "reference", shape "win", "sigmoid" or "margin", and every a whole number above 0'
            )
        if "policy" not in context:
            raise ValueError("there is no policy to play against; it works in train.py only")
        self.policy, self.tokenizer, self.sampling = (
            context["policy"],
            context["tokenizer"],
            context["sampling"],
        )
        self.examples = {
            example.prompt: example for example in context["examples"]
        }  # a dialogue's prompt is more than its text
        self.kind, self.every, self.shape, self.seed = (
            opponent,
            every,
            shape,
            context.get("seed", 0),
        )
        self.snapshot: HybridModel | None = None
        self.rounds = 0  # of training
        self.win_rate = float("nan")

    def answers(self, prompts: list[str], reference: HybridModel | None, learn: bool) -> list[str]:
        """The opponent's responses; in training (`learn`) it is renewed first when its time has come."""
        if learn:
            if self.kind == "snapshot" and self.rounds % self.every == 0:
                self.snapshot = self.policy.frozen_copy()
            self.rounds += 1
        model = (
            reference if self.kind == "reference" else self.snapshot
        ) or self.policy  # before there is one, it is the policy itself
        room = self.sampling["max_length"] - self.sampling["max_new_tokens"]
        ids = [
            encode_prompt(self.tokenizer, self.examples.get(prompt, Example(prompt, "")))[-room:]
            for prompt in prompts
        ]
        options = dict(
            max_new_tokens=self.sampling["max_new_tokens"],
            temperature=self.sampling["temperature"],
            eos_token_id=self.tokenizer.eos_token_id,
        )
        seed = (
            (self.seed * 2**20 + (self.rounds if learn else 2**20 - 1)) * 2**10 + parallel.rank()
        ) ^ 2**62  # a bit that the policy's own seeds lack
        generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
        return [
            decode(self.tokenizer, response)
            for response in sample(model, ids, generator=generator, **options).responses
        ]

    def __call__(self, ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        """Scores of both, (B,), NaN where there is none -> shaped reward (B,), NaN likewise."""
        margin = ours - theirs  # (B,)
        win = torch.where(margin.isnan(), margin, (margin.sign() + 1) / 2)  # (B,)
        self.win_rate = float(win.nanmean())
        return {"win": win, "sigmoid": torch.sigmoid(margin), "margin": margin}[self.shape]

    def state_dict(self) -> dict:
        return {"rounds": self.rounds, "snapshot": self.snapshot and self.snapshot.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.rounds = state["rounds"]
        if state["snapshot"] is not None:
            self.snapshot = self.policy.frozen_copy()
            self.snapshot.load_state_dict(state["snapshot"])
