"""Self-play: a response is worth the probability that it beats an earlier policy's response.

    self_play(base, opponent="snapshot", every=50, shape="win")     in a --reward expression

`base` is any expression. The opponent answers the same prompt, and it is frozen: the policy as it
was when the last `every` PPO steps began, or the KL reference (`opponent="reference"`). `base`
scores both responses, and the shaped reward is

    win        1 if the policy's response has the higher score, 0 if the lower, 1/2 for a tie
    sigmoid    sigmoid(score - opponent_score), the Bradley-Terry probability of winning
    margin     score - opponent_score

A policy that equals its opponent gains nothing: the mean of every shape is then its value at a tie
(1/2, 1/2, 0). Left out on purpose: leagues of opponents, Elo.

    python train.py --reward "self_play(sentiment, every=20)"
"""

import torch

import parallel
from chat import cut_prompt, end_ids
from data import Example, decode, encode_prompt
from generate import sample
from hybrid import HybridModel


class SelfPlay:
    """The opponent of a `self_play(...)`. `context` has policy (HybridModel), tokenizer, sampling
    (max_length, max_new_tokens, temperature), examples, and may have seed and `reference`, a
    function that returns the present KL reference (None before there is one)."""

    def __init__(
        self, context: dict, opponent: str = "snapshot", every: int = 50, shape: str = "win"
    ):
        known = opponent in ("snapshot", "reference") and shape in ("win", "sigmoid", "margin")
        if not known or not isinstance(every, int) or every < 1:
            raise ValueError(
                'opponent is "snapshot" or "reference", shape "win", "sigmoid" or "margin", '
                "and every a whole number above 0"
            )
        if "policy" not in context:
            raise ValueError("there is no policy to play against; it works in train.py only")
        self.policy, self.tokenizer = context["policy"], context["tokenizer"]
        self.sampling, self.seed = context["sampling"], context.get("seed", 0)
        # Of a dialogue, `encode_prompt` needs the messages, not only the text of the prompt.
        self.examples = {example.prompt: example for example in context["examples"]}
        self.ask_reference = context.get("reference", lambda: None)
        self.kind, self.every, self.shape = opponent, every, shape
        self.snapshot: HybridModel | None = None
        self.rounds = 0  # calls in training
        self.win_rate = float("nan")

    def answers(self, prompts: list[str], learn: bool) -> list[str]:
        """The opponent's responses. In training (`learn`) a due snapshot is taken first."""
        if learn:
            if self.kind == "snapshot" and self.rounds % self.every == 0:
                self.snapshot = self.policy.frozen_copy()
            self.rounds += 1
        opponent = self.ask_reference() if self.kind == "reference" else self.snapshot
        # Until there is an opponent, the policy plays against itself.
        model = self.policy if opponent is None else opponent
        longest = self.sampling["max_length"] - self.sampling["max_new_tokens"]
        examples = [self.examples.get(prompt, Example(prompt, "")) for prompt in prompts]
        ids = []
        for example in examples:
            prompt = encode_prompt(self.tokenizer, example)
            ids.append(cut_prompt(self.tokenizer, example, prompt, longest))
        number = self.rounds if learn else 2**20 - 1
        seed = (self.seed * 2**20 + number) * 2**10 + parallel.rank()
        seed ^= 2**62  # so it differs from every seed of the policy's own sampling
        generation = sample(
            model,
            ids,
            max_new_tokens=self.sampling["max_new_tokens"],
            temperature=self.sampling["temperature"],
            eos_token_id=end_ids(self.tokenizer, model.lm),
            generator=torch.Generator(next(model.parameters()).device).manual_seed(seed),
        )
        return [decode(self.tokenizer, response) for response in generation.responses]

    def __call__(self, scores: torch.Tensor, opponent_scores: torch.Tensor) -> torch.Tensor:
        """Scores of both responses, (B,) -> shaped reward (B,). NaN, no score, stays NaN."""
        margin = scores - opponent_scores  # (B,)
        win = torch.where(margin.isnan(), margin, (margin.sign() + 1) / 2)  # (B,)
        self.win_rate = float(win.nanmean())
        return {"win": win, "sigmoid": torch.sigmoid(margin), "margin": margin}[self.shape]

    def state_dict(self) -> dict:
        return {"rounds": self.rounds, "snapshot": self.snapshot and self.snapshot.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.rounds, self.snapshot = state["rounds"], None
        if state["snapshot"] is not None:
            self.snapshot = self.policy.frozen_copy()
            self.snapshot.load_state_dict(state["snapshot"])
