"""Ten functions of this project for you to write: replace each `raise` by your code, then check it.

    python -m pytest exercises            # all ten
    python -m pytest exercises -k gae     # one of them, by a part of its name

B is rows, T is columns (tokens), V the vocabulary; log-probabilities are natural logarithms. Every
tensor is indexed by the token it is about. The last line of a docstring says where the solution of
this repository stands: look there afterwards. Write each function without the others, or with your
own ones. Left out on purpose: whole training loops; docs/lesson.md has one.
"""

import torch


def masked_mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of x over the True positions of mask, as a scalar; 0 if there are none.

    x float and mask bool, of one shape. What is off the mask must not matter, not even NaN.
    Every loss here is such a mean: over the tokens of all rows, not over the means of rows.

    >>> x = torch.tensor([[1.0, 2.0], [6.0, 9.0]])
    >>> masked_mean(x, torch.tensor([[True, True], [True, False]])).item()
    3.0

    Solution: `hybrid.py: masked_mean`
    """
    raise NotImplementedError("write me")


def kl_k3(logprobs: torch.Tensor, ref_logprobs: torch.Tensor) -> torch.Tensor:
    """Estimate KL(policy || reference) at each token, from tokens that the policy drew.

    Schulman, "Approximating KL Divergence" (http://joschu.net/blog/kl-approx.html), the third
    estimator: with ratio = reference probability / policy probability of the token that was drawn,

        k3 = (ratio - 1) - log ratio

    Both inputs have one shape, and so has the result. It is never negative. On average over the
    policy's tokens it is the KL. Here the policy gives the token 1/2, the reference 1/4:

    >>> k3 = kl_k3(torch.tensor([0.5]).log(), torch.tensor([0.25]).log())
    >>> round(k3.item(), 4)  # 1/2 - 1 + log 2
    0.1931

    Solution: `ppo.py: kl_estimate`
    """
    raise NotImplementedError("write me")


def compute_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimation (1506.02438, eq. 16): all (B, T) -> advantages, returns.

        delta_t = r_t + gamma V_(t+1) - V_t
        A_t     = delta_t + gamma lam delta_(t+1) + (gamma lam)^2 delta_(t+2) + ...
        returns = A + V

    t+1 is the next column ON the mask: a row may have gaps, where a user speaks in a dialogue, and
    what stands in a gap does not matter. After the last column on the mask nothing comes: no value,
    no delta. Both results are 0 off the mask. Here column 1 is a gap:

    >>> rewards, values = torch.tensor([[0.0, 9.0, 1.0]]), torch.tensor([[0.5, 9.0, 0.75]])
    >>> mask = torch.tensor([[True, False, True]])
    >>> [x.tolist() for x in compute_gae(rewards, values, mask, lam=1.0)]
    [[[0.5, 0.0, 0.25]], [[1.0, 0.0, 1.0]]]

    Solution: `ppo.py: compute_gae`
    """
    raise NotImplementedError("write me")


def clipped_surrogate(
    new_logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    cliprange: float = 0.2,
) -> torch.Tensor:
    """PPO's policy loss (1707.06347, eq. 7, with its sign turned): all (B, T) -> a scalar.

    With r = new probability / old probability of a token and A its advantage, the loss of a token
    is the larger one of  -A r  and  -A clip(r, 1 - cliprange, 1 + cliprange). The result is the
    mean over the tokens on the mask. Gradients flow into new_logprobs. Here r = 1.5 is too likely
    already, so it counts as 1.2:

    >>> new, old = torch.tensor([[1.5]]).log(), torch.tensor([[0.0]])
    >>> round(clipped_surrogate(new, old, torch.tensor([[2.0]]), torch.tensor([[True]])).item(), 4)
    -2.4

    Solution: `ppo.py: clipped_surrogate`
    """
    raise NotImplementedError("write me")


def place_rewards(
    kl: torch.Tensor, mask: torch.Tensor, kl_coef: float, scores: torch.Tensor
) -> torch.Tensor:
    """The reward of each token (1909.08593, eq. 2): kl, mask (B, T), scores (B,) -> (B, T).

    Every token on the mask pays kl_coef times its KL. The last token on the mask of each row also
    gets the score of the row; every row has one. Off the mask the reward is 0, whatever kl is.

    >>> kl, mask = torch.tensor([[9.0, 1.0, 2.0, 9.0]]), torch.tensor([[False, True, True, False]])
    >>> place_rewards(kl, mask, 0.5, torch.tensor([10.0])).tolist()
    [[0.0, -0.5, 9.0, 0.0]]

    Solution: `ppo.py: place_rewards` (which takes the places of the scores too)
    """
    raise NotImplementedError("write me")


def sample(
    lm: torch.nn.Module,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_token_id: int,
    temperature: float = 1.0,
    generator: torch.Generator | None = None,
) -> list[list[int]]:
    """Token ids of prompts -> of responses. Each is drawn from softmax(logits / temperature).

    A response ends with its first EOS, which is a part of it, or has `max_new_tokens` tokens.
    Temperature 0 takes the most likely token. `lm` is a causal LM of transformers:

        lm(input_ids=..., attention_mask=..., position_ids=...).logits    (B, T, V)

    Prompts differ in length. The next token of every row is read at its last column, so all rows
    must end in the same column, and padding (any id, such as EOS) stands on the LEFT:

        column            0    1    2    3                     4
        input_ids         PAD  PAD  q0   q1    -> next token:  r0
                          p0   p1   p2   p3                    r0
        attention_mask    0    0    1    1                     1
        position_ids      0    0    0    1                     2

    Two things would go wrong silently. Without the mask, tokens attend to the padding. Without the
    positions, a model with learned positions (GPT-2) takes q0 for the third token of its text. In
    both cases the model draws from other probabilities than those that PPO computes afterwards, for
    rows without padding on the left. Reading the whole row again for every token is slow and right;
    you need no cache.

    Solution: `generate.py: generate` (with a cache, and rows that leave when they end)
    """
    raise NotImplementedError("write me")


def bleu(hypothesis: str, references: list[str]) -> float:
    """Sentence BLEU, 0 to 1 (Papineni et al. 2002, section 2; the smoothing "exp" of mteval-v13a).

    Words are what spaces separate; the texts of the checks have no punctuation.

    * Precision of order n (1 to 4): the n-grams of the hypothesis that a reference has, divided by
      the n-grams of the hypothesis. An n-gram counts at most as often as in the one reference that
      has it most often.
    * The score is the geometric mean of the precisions, over the orders that the hypothesis is long
      enough to have, times the brevity penalty: min(1, exp(1 - r / h)), with h words in the
      hypothesis and r in the reference whose length is closest (of two, the shorter).
    * Smoothing: the k-th order without a match (k = 1, 2, ...) has precision 1 / (2^k n-grams)
      instead of 0. If no order has a match, the score is 0.

    >>> round(bleu("the cat sat on the mat", ["the cat sat on a mat"]), 4)  # 5/6, 3/5, 2/4, 1/3
    0.5373

    Solution: `rewards.py: bleu`
    """
    raise NotImplementedError("write me")


def bradley_terry_loss(chosen_scores: torch.Tensor, rejected_scores: torch.Tensor) -> torch.Tensor:
    """The loss of a reward model (2203.02155, eq. 1, for two responses): (B,) each -> a scalar.

    Bradley and Terry (1952): the probability that `chosen` is the better one is
    sigmoid(chosen score - rejected score). The loss is the mean over pairs of minus its logarithm.
    It must stay finite for scores that are a thousand apart.

    >>> loss = bradley_terry_loss(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0]))
    >>> round(loss.item(), 4)  # (0.1269 + log 2) / 2
    0.41

    Solution: `reward_model.py: reward_model_loss`
    """
    raise NotImplementedError("write me")


def dpo_loss(
    policy_chosen_logps: torch.Tensor,
    policy_rejected_logps: torch.Tensor,
    reference_chosen_logps: torch.Tensor,
    reference_rejected_logps: torch.Tensor,
    beta: float = 0.1,
) -> torch.Tensor:
    """The loss of DPO (2305.18290, eq. 7) for each pair: (B,) each -> (B,).

    Inputs are log-probabilities of whole responses. The implicit reward of a response is beta times
    (log policy - log reference). The loss is that of a reward model, with the implicit rewards as
    scores. It must stay finite however far apart they are.

    >>> losses = dpo_loss(*torch.tensor([[-3.0], [-6.0], [-5.0], [-5.0]]), beta=0.5)
    >>> round(losses.item(), 4)  # -log sigmoid(1.5)
    0.2014

    Solution: `dpo.py: dpo_loss`
    """
    raise NotImplementedError("write me")


def group_advantages(scores: torch.Tensor, group_size: int) -> torch.Tensor:
    """The advantages of GRPO (2402.03300, section 4.1.2): scores (B,) -> (B,).

    The `group_size` responses to one prompt stand next to each other. The advantage of a response
    is (its score - the mean of its group) / the standard deviation of its group: the biased one,
    which divides by group_size. Where all scores of a group are equal, the advantages are 0.

    >>> group_advantages(torch.tensor([1.0, 3.0, 5.0, 5.0]), group_size=2).tolist()
    [-1.0, 1.0, 0.0, 0.0]

    Solution: `grpo.py: group_advantages`
    """
    raise NotImplementedError("write me")
