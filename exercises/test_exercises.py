"""Checks what you wrote in exercises.py, and says what is wrong in one line.

Each check has numbers worked out by hand, and compares with the function of the repository. Typical
mistakes are known by the numbers that they give. Left out on purpose: speed.

    python -m pytest exercises -k gae
"""

import math
import random
import sys
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import dpo  # noqa: E402
import exercises  # noqa: E402
import grpo  # noqa: E402
import ppo  # noqa: E402
import reward_model  # noqa: E402
import rewards  # noqa: E402


def wrong(what):
    """The check ends with this line, without a traceback."""
    pytest.fail(what, pytrace=False)


def call(name, *arguments, **options):
    """What the function of exercises.py gives."""
    try:
        result = getattr(exercises, name)(*arguments, **options)
    except NotImplementedError as not_written:
        result = not_written
    if isinstance(result, NotImplementedError):
        wrong("not written yet: replace its `raise` in exercises/exercises.py")
    if result is None:
        wrong("it returns nothing")
    return result


def same(a, b):
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


def agree(got, expected, mistakes=None):
    """`mistakes`: what is wrong -> what a function with that mistake gives."""
    got, expected = torch.as_tensor(got), torch.as_tensor(expected)
    if same(got, expected):
        return
    if got.shape != expected.shape:
        wrong(f"the shape is {tuple(got.shape)}, expected {tuple(expected.shape)}")
    for what, result in (mistakes or {}).items():
        if same(got, result):
            wrong(what)
    if same(got, -expected):
        wrong("the sign is wrong")
    found, known = [[round(v, 4) for v in x.double().flatten().tolist()] for x in (got, expected)]
    wrong(f"found {found}, expected {known}")


def columns(n, seed):
    """n random tensors (5, 9), and a mask with gaps in its last two rows."""
    rows = ["011111111", "001110000", "010000000", "011001010", "010000001"]
    mask = torch.tensor([[digit == "1" for digit in row] for row in rows])
    return *torch.randn(n, *mask.shape, generator=torch.Generator().manual_seed(seed)), mask


def wrong_means(x, mask):
    return {
        "your mean counts padding: only what is on the mask counts": x.mean(),
        "you divided by B*T: divide by the number of True positions": (x * mask).mean(),
        "that is a sum: divide by the number of True positions": x[mask].sum(),
        "that is a mean of row means": ((x * mask).sum(1) / mask.sum(1)).mean(),
    }


def test_masked_mean():
    x, mask = columns(1, seed=1)
    agree(call("masked_mean", x, mask), x[mask].mean(), wrong_means(x, mask))
    nan = {"NaN * 0 is NaN: choose with torch.where, do not multiply": math.nan}
    agree(call("masked_mean", torch.where(mask, x, math.nan), mask), x[mask].mean(), nan)
    empty = {"a mask without a True position gives 0 / 0: it must give 0": math.nan}
    agree(call("masked_mean", x, mask & False), 0.0, empty)


def test_kl_k3():
    p, q = [torch.tensor(x).softmax(0) for x in ([0.1, 1.5, -0.7, 0.4], [1.0, 0.2, 0.3, -1.0])]
    mistakes = {
        "policy and reference have changed places": p / q - 1 - (p / q).log(),
        "that is k1, the log-ratio itself": (p / q).log(),
        "that is k2, half the squared log-ratio": (p / q).log() ** 2 / 2,
        "log ratio has the wrong sign": q / p - 1 + (q / p).log(),
        "the 1 is missing: equal probabilities must give 0": q / p - (q / p).log(),
    }
    k3 = call("kl_k3", p.log(), q.log())
    agree(k3, q / p - 1 - (q / p).log(), mistakes)
    agree((p * k3).sum(), (p * (p / q).log()).sum())  # its expectation is the KL
    new, ref, _ = columns(2, seed=2)
    agree(call("kl_k3", new, ref), ppo.kl_estimate(new, ref, "k3"))


def test_compute_gae():
    gae = ppo.compute_gae
    r, v = torch.tensor([[9.0, 1.0, 9.0, 2.0, 4.0]]), torch.tensor([[9.0, 0.5, 9.0, 1.5, 3.0]])
    mask = torch.tensor([[False, True, False, True, True]])
    for lam, expected in ((1.0, [0, 6.5, 0, 4.5, 1.0]), (0.0, [0, 2.0, 0, 3.5, 1.0])):
        found = call("compute_gae", r, v, mask, 1.0, lam)
        if not isinstance(found, tuple) or len(found) != 2:
            wrong("return two tensors: advantages, returns")
        gap, all_on = "the next value must skip the columns off the mask", mask | True
        before_gap = torch.tensor([[False, True, False, False, False]])
        each_alone = [gae(r, v, part, 1.0, lam)[0] for part in (before_gap, mask & ~before_gap)]
        mistakes = {
            gap: gae(r, v, all_on, 1.0, lam)[0] * mask,
            f"{gap}: they have no value": gae(r * mask, v * mask, all_on, 1.0, lam)[0] * mask,
            f"{gap}: a gap is not the end of the response": sum(each_alone),
        }
        agree(found[0] * mask, [expected], mistakes)
        agree(found[0], [expected], {"advantages must be 0 off the mask": found[0]})
    r, v, mask = columns(2, seed=3)
    advantages, returns = gae(r, v, mask, 0.9, 0.7)
    is_last = torch.where(mask, torch.arange(9), -1).amax(1, keepdim=True) == torch.arange(9)
    mistakes = {
        "gamma is missing": gae(r, v, mask, 1.0, 0.7)[0],
        "lam is missing": gae(r, v, mask, 0.9, 1.0)[0],
        "your advantages are the returns: subtract V": returns,
        "a value after the last token": gae(r + 0.9 * v * is_last, v, mask, 0.9, 0.7)[0],
    }
    found = call("compute_gae", r, v, mask, 0.9, 0.7)
    agree(found[0], advantages, mistakes)
    agree(found[1], returns, {"returns must be 0 off the mask": advantages + v})


def test_clipped_surrogate():
    ratio, a = torch.tensor([[1.1, 1.5, 0.5, 1.5, 0.5], [2.0, 2, 2, -2, -2]])
    plain, cut = -a * ratio, -a * ratio.clamp(0.8, 1.2)
    mistakes = {
        "there is no clip": plain,
        "you always clip: take the larger of the two losses": cut,
        "you take the smaller of the two losses: take the larger": torch.min(plain, cut),
        "the ratio is new / old": torch.max(-a / ratio, -a * (1 / ratio).clamp(0.8, 1.2)),
    }
    new, one = ratio.log().view(5, 1, 1).requires_grad_(), torch.tensor([[True]])
    inputs = [(x, torch.zeros(1, 1), y) for x, y in zip(new, a.view(5, 1, 1))]  # a token each
    losses = torch.stack([call("clipped_surrogate", *x, one) for x in inputs])
    agree(losses, [-2.2, -2.4, -1.0, 3.0, 1.6], mistakes)
    if not losses.requires_grad:
        wrong("no gradient reaches new_logprobs")
    gradient = torch.autograd.grad(losses.sum(), new)[0].flatten()
    agree(gradient, [-2.2, 0.0, -1.0, 3.0, 0.0])
    new, old, a, mask = columns(3, seed=4)
    tokens = torch.max(-a * (new - old).exp(), -a * (new - old).exp().clamp(0.87, 1.13))
    mistakes = {"cliprange is not used": ppo.clipped_surrogate(new, old, a, mask)[0]}
    expected = ppo.clipped_surrogate(new, old, a, mask, 0.13)[0]
    found = call("clipped_surrogate", new, old, a, mask, 0.13)
    agree(found, expected, mistakes | wrong_means(tokens, mask))


def test_place_rewards():
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0], [0, 1, 0, 1, 0]]).bool()
    kl = torch.tensor([[9.0, 1, 2, 3, 9], [9, 9, 4, 9, 9], [9, 1, 9, 2, 9]])
    scores, price = torch.tensor([10.0, 20.0, 30.0]), torch.where(mask, -0.5 * kl, 0)
    expected = torch.tensor([[0, -0.5, -1, 8.5, 0], [0, 0, 18, 0, 0], [0, -0.5, 0, 29, 0]])
    first = mask & (mask.cumsum(1) == 1)
    mistakes = {
        "the score stands on every token, not on the last one": price + mask * scores[:, None],
        "the score stands on the first token, not on the last": price + first * scores[:, None],
        "no score arrives: it is put into a column off the mask": price,
        "the KL raises the reward: a token pays for it": expected - 2 * price,
        "off the mask the reward is 0": expected - 0.5 * kl * ~mask,
    }
    agree(call("place_rewards", kl, mask, 0.5, scores), expected, mistakes)
    kl, more, mask = columns(2, seed=8)
    placed = ppo.Scores(more[:, 0], torch.arange(5), torch.tensor([8, 4, 1, 7, 8]))
    agree(
        call("place_rewards", kl, mask, 0.3, more[:, 0]), ppo.place_rewards(kl, mask, 0.3, placed)
    )


def gpt2(scale):
    """A random GPT-2, whose positions are learned. `scale` 0: only the norms' weights are not 0."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=23, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    lm = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=2, eos_token_id=2)).eval()
    for parameter in lm.parameters():
        parameter.data *= scale
    return lm


@torch.no_grad()
def most_likely(lm, ids, first=0):
    """The four most likely tokens after one row, whose positions begin at `first`."""
    row = list(ids)
    while len(row) < len(ids) + 4:
        positions = torch.arange(first, first + len(row))[None]
        row.append(int(lm(torch.tensor([row]), position_ids=positions).logits[0, -1].argmax()))
    return row[len(ids) :]


def test_sample():
    lm, prompts = gpt2(6.0), [[5, 6, 7, 8, 9, 10], [11, 12], [13]]
    padding = [(p, [0] * (6 - len(p))) for p in prompts]
    alone = [most_likely(lm, p) for p in prompts]
    if [call("sample", lm, [p], 4, 0, 0)[0] for p in prompts] != alone:
        wrong("a prompt alone, temperature 0: these are not the most likely tokens after it")
    found = call("sample", lm, prompts, 4, 0, 0)
    if found == [most_likely(lm, p, first=len(pad)) for p, pad in padding]:
        wrong("positions count the padding: position_ids must count real tokens only")
    if found == [most_likely(lm, pad + p) for p, pad in padding]:
        wrong("tokens see the padding: attention_mask and position_ids must leave it out")
    if found == [most_likely(lm, p + pad) for p, pad in padding]:
        wrong("the padding is on the right: the next token is read after the padding")
    if found != alone:
        wrong(f"prompts of unequal lengths give {found}, each of them alone {alone}")
    lm, scores = gpt2(0.0), torch.randn(23, generator=torch.Generator().manual_seed(0))
    lm.transformer.ln_f.bias.data[0], lm.lm_head.weight.data[:, 0] = 1.0, scores  # for every text
    generator = torch.Generator().manual_seed(1)
    for temperature in (1.0, 0.5):
        found = call("sample", lm, [[5]] * 1000, 3, 9, temperature, generator)
        if any(9 in r[:-1] or len(r) > 3 for r in found):
            wrong("a response goes on after its EOS, or is longer than max_new_tokens")
        if any(r[-1:] != [9] and len(r) < 3 for r in found):
            wrong("a response ends early without EOS: EOS is a part of the response")
        share = torch.tensor([r[0] for r in found]).bincount(minlength=23) / 1000
        if (share - (scores / temperature).softmax(0)).abs().max() > 0.06:
            wrong(f"temperature {temperature}: no draws from softmax(logits / temperature)")


def test_bleu():
    for hypothesis, references, expected, what in (
        ("the the cat sat on a mat", ["the cat sat on the rug"], 1 / 28**0.25, "geometric mean"),
        ("a b c d", ["a b c d e f"], math.exp(-0.5), "brevity penalty"),
        ("a a a a b", ["a b c d e"], (2 / 5 / 4 / 6 / 8) ** 0.25, "clipped counts"),
        ("a b x y", ["a b c d e"], math.exp(-0.25) / 96**0.25, "smoothing"),
        ("the cat", ["the cat"], 1.0, "orders that the hypothesis is too short to have"),
        ("a b c d", ["a b c d e f", "a b c x"], 1.0, "reference of the closest length"),
        ("x y", ["a b"], 0.0, "no match"),
        ("", ["a"], 0.0, "empty hypothesis"),
    ):
        found = call("bleu", hypothesis, references)
        if not same(found, expected):
            wrong(f"{what}: {hypothesis!r} against {references} gives {found}, not {expected:.4f}")
    rng = random.Random(0)
    for _ in range(50):
        texts = [" ".join(rng.choices("abcd", k=rng.randint(1, 9))) for _ in range(3)]
        agree(call("bleu", texts[0], texts[1:]), rewards.bleu(texts[0], texts[1:]))


def test_bradley_terry_loss():
    chosen, rejected = torch.tensor([2.0, -1.3, 0.4]), torch.tensor([0.5, 0.9, 0.4])
    mistakes = {
        "chosen and rejected have changed places": (1 + (chosen - rejected).exp()).log().mean(),
        "the logarithm is missing": -torch.sigmoid(chosen - rejected).mean(),
    }
    expected = (0.2014133 + 2.3050832 + math.log(2)) / 3  # log(1 + exp(-1.5)), log(1 + exp(2.2))
    agree(call("bradley_terry_loss", chosen, rejected), expected, mistakes)
    scores, more, _ = columns(2, seed=5)
    expected = reward_model.reward_model_loss(scores[:, 0] * 9, more[:, 0])
    agree(call("bradley_terry_loss", scores[:, 0] * 9, more[:, 0]), expected)
    infinite = {"log(sigmoid(-1000)) is -inf: use logsigmoid": math.inf}
    agree(call("bradley_terry_loss", torch.tensor([0.0]), torch.tensor([1e3])), 1e3, infinite)


def test_dpo_loss():
    logps = torch.tensor([[-3.0, -4, -3.5, -3], [-10, -1, -2, -9], [-7, -7, -5, -9]]).double()
    pc, pr, rc, rr = logps.T
    margin = (pc - rc) - (pr - rr)
    mistakes = {
        "chosen and rejected have changed places": (1 + (0.5 * margin).exp()).log(),
        "the reference is missing": (1 + (-0.5 * (pc - pr)).exp()).log(),
        "beta is missing": (1 + (-margin).exp()).log(),
    }
    expected = [0.386871, 8.000335, 2.126928]  # log(1 + exp(-0.75)), exp(8), exp(2)
    agree(call("dpo_loss", pc, pr, rc, rr, 0.5), expected, mistakes)
    inputs = [x[:, 0] * 9 for x in columns(4, seed=6)[:4]]
    agree(call("dpo_loss", *inputs), dpo.dpo_loss(*inputs)[0])
    far = torch.tensor([[-1e4], [-1.0], [-1.0], [-1e4]])
    agree(call("dpo_loss", *far), [1999.8], {"use logsigmoid, not log(sigmoid)": [math.inf]})


def test_group_advantages():
    scores = torch.tensor([1.0, 2, 6, 0, 1, 2])
    groups, std = scores.view(2, 3), (14 / 3) ** 0.5
    centered = groups - groups.mean(1, keepdim=True)
    mixed = grpo.group_advantages(scores.view(3, 2).T.flatten(), 3).view(2, 3)
    mistakes = {
        "that is the unbiased deviation": (centered / groups.std(1, keepdim=True)).flatten(),
        "the standard deviation is missing": centered.flatten(),
        "that compares the responses to all prompts": (scores - 2) / scores.std(correction=0),
        "a group stands next to each other: view(-1, group_size)": mixed.T.flatten(),
    }
    expected = [-2 / std, -1 / std, 3 / std, -(1.5**0.5), 0, 1.5**0.5]
    agree(call("group_advantages", scores, 3), expected, mistakes)
    equal = torch.tensor([5.0, 5, 5, 2, 2, 4])
    agree(call("group_advantages", equal, 3), grpo.group_advantages(equal, 3))
    scores = columns(1, seed=7)[0].flatten()[:40]
    agree(call("group_advantages", scores, 4), grpo.group_advantages(scores, 4))
