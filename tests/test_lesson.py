"""The lesson of docs/lesson.md: its blocks run one after the other, shortened, in one namespace.

After each block what it defined is compared with the functions of the repository, so that a wrong
line fails here.
"""

import contextlib
import io
import re
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import ppo
from data import make_batch
from generate import generate
from hybrid import HybridModel
from sft import sft_loss

LESSON = (ROOT / "docs" / "lesson.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", LESSON, re.DOTALL)
SHORT = {
    "limit=2000": "limit=120",
    "random.sample(rows, 32)": "random.sample(rows, 8)",
    "range(100)": "range(21)",
    "rollout(rows[:32])": "rollout(rows[:4])",
    "range(50)": "range(1)",
    "range(160)": "range(2)",
    "rows[:200], rows[200:]": "rows[:10], rows[10:]",
}


@pytest.fixture(scope="module")
def lesson():
    """`run(k)` runs blocks 1 to k, each once. -> the names, what block k printed."""
    space, printed = {}, []

    def run(k: int) -> tuple[SimpleNamespace, str]:
        while len(printed) < k:
            code = BLOCKS[len(printed)]
            for long, short in SHORT.items():
                code = code.replace(long, short)
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, space)
            printed.append(out.getvalue())
        return SimpleNamespace(**space), printed[k - 1]

    run.space = space
    return run


def scores_of(lm, rows):
    """What the repository's forward says about these prompts and responses, and their batch."""
    batch = make_batch(None, *map(list, zip(*rows)), max_length=256)
    with torch.no_grad():
        return HybridModel(lm)(batch.input_ids, batch.attention_mask, batch.response_mask), batch


def test_the_lesson_is_short_and_every_cut_of_this_test_is_in_it():
    code = "\n\n\n".join(BLOCKS)
    compile(code, "lesson", "exec")
    lines = [line for line in code.splitlines() if line.strip()]
    assert len(BLOCKS) == 7 and 60 <= len(lines) <= 120 and max(map(len, lines)) <= 100
    assert all(long in code for long in SHORT)
    ours = set(re.findall(r"^from (\w+) import", code, re.MULTILINE)) - {"transformers"}
    assert ours == {"data", "hybrid"}


def test_1_rows(lesson):
    own, printed = lesson(1)
    ids, mask = own.batch_of(own.rows[:5])
    batch = make_batch(own.tokenizer, *map(list, zip(*own.rows[:5])), max_length=256)
    assert torch.equal(ids, batch.input_ids) and torch.equal(mask, batch.response_mask)
    assert all(response[-1] == own.EOS for _, response in own.rows) and len(own.held_out) == 10
    assert "<|endoftext|>" in printed


def test_2_sft(lesson):
    own, printed = lesson(2)
    scores, batch = scores_of(own.lm, own.rows[:5])
    with torch.no_grad():
        logprobs, states = own.read(own.lm, batch.input_ids)
        loss = own.sft_loss(own.rows[:5])
        expected = HybridModel(own.lm).states_before(
            batch.input_ids, batch.attention_mask, batch.response_mask
        )
    mask = batch.response_mask
    torch.testing.assert_close(logprobs * mask, scores.logprobs, atol=1e-4, rtol=0)
    torch.testing.assert_close(states[mask], expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(loss, sft_loss(scores.logprobs, mask))
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", printed)]
    assert losses[0] == pytest.approx(6.2, abs=0.2) and losses[-1] < 3


def test_3_reward(lesson):
    own, printed = lesson(3)
    assert printed.split() == ["0.6666666666666666", "-0.5"]
    assert own.reward_of("the plot") == 0


def test_4_sample(lesson, monkeypatch):
    own, printed = lesson(4)
    prompts = [prompt for prompt, _ in own.rows[:6]]
    assert len({len(prompt) for prompt in prompts}) > 2
    responses = own.sample(prompts)
    assert all(own.EOS not in r[:-1] for r in responses)
    assert all(r[-1] == own.EOS or len(r) == 24 for r in responses)
    seen = []

    def look(module, inputs, options):
        seen.append(options["position_ids"])

    def most_likely(probs, n):
        return probs.argmax(-1, keepdim=True)

    hook = own.lm.model.register_forward_pre_hook(look, with_kwargs=True)
    monkeypatch.setattr(torch, "multinomial", most_likely)
    responses = own.sample(prompts)
    hook.remove()
    model = HybridModel(own.lm)
    options = dict(max_new_tokens=24, eos_token_id=own.EOS, temperature=0)
    assert responses == generate(model, prompts, **options).responses
    widest = max(map(len, prompts))
    for row, prompt in zip(seen[0].tolist(), prompts):
        assert row == [0] * (widest - len(prompt)) + list(range(len(prompt)))
    assert seen[2][:, 0].tolist() == [len(prompt) + 1 for prompt in prompts]
    assert "after sft: reward" in printed


def test_5_rewards_and_advantages(lesson, monkeypatch):
    own, printed = lesson(5)
    assert "KL 0.0 nats" in printed.replace("-0.0", "0.0")
    sampled = [(prompt, response[:n]) for (prompt, response), n in zip(own.rows, (3, 30, 1, 6))]
    given = torch.tensor([0.7, -0.4, 0.1, 0.5])
    monkeypatch.setitem(lesson.space, "sample_and_score", lambda rows: (sampled, given))
    with torch.no_grad():  # another reference, so that there is a KL; and values that are not 0
        monkeypatch.setattr(own.reference.model.norm.weight, "data", torch.linspace(0.2, 2, 192))
        (ids, mask, logprobs, white, returns), _ = own.rollout(sampled)
        policy, batch = scores_of(own.lm, sampled)
        values = own.value_head(own.read(own.lm, ids)[1]).squeeze(2)
    kl = policy.logprobs - scores_of(own.reference, sampled)[0].logprobs
    last = torch.tensor([len(prompt + response) - 1 for prompt, response in sampled])
    places = ppo.Scores(given, torch.arange(4), last)
    rewards = ppo.place_rewards(kl, mask, 0.05, places)
    advantages, expected = ppo.compute_gae(rewards, values, mask)
    torch.testing.assert_close(returns * mask, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(logprobs * mask, policy.logprobs, atol=1e-4, rtol=0)
    n = mask.sum()
    expected = ppo.masked_whiten(advantages, mask) * ((n - 1) / n).sqrt()  # unbiased deviation
    torch.testing.assert_close(white[mask], expected[mask], atol=1e-3, rtol=0)
    assert torch.equal(mask, batch.response_mask) and kl.abs().max() > 0.1
    torch.testing.assert_close(
        own.gae(rewards, values, mask, lam=0.6), ppo.compute_gae(rewards, values, mask, lam=0.6)[0]
    )


def test_6_ppo(lesson, monkeypatch):
    own, printed = lesson(6)
    mask = torch.tensor([[0, 1, 1, 1, 0], [0, 1, 0, 0, 0], [0, 0, 1, 1, 1]]).bool()
    new, old, a = torch.randn(3, 3, 5, generator=torch.Generator().manual_seed(0))
    expected = ppo.clipped_surrogate(new, old, a, mask)[0]
    torch.testing.assert_close(own.policy_loss(new, old, a, mask), expected)

    data, said = own.rollout(own.rows[:6])
    losses = []
    monkeypatch.setitem(lesson.space, "rollout", lambda rows: (data, said))
    monkeypatch.setitem(lesson.space, "update", lambda loss: losses.append(loss.item()))
    torch.manual_seed(3)
    own.ppo_step(own.rows[:6])
    torch.manual_seed(3)
    ids, mask, old, a, returns = data
    parts = [*torch.randperm(6).chunk(2), *torch.randperm(6).chunk(2)]  # two passes over the rows
    with torch.no_grad():
        values = own.value_head(own.read(own.lm, ids)[1]).squeeze(2)
    for part, loss in zip(parts, losses, strict=True):
        columns = [x[part] for x in (old, old, a, values, values, returns, mask)]
        assert loss == pytest.approx(ppo.ppo_loss(*columns)[0].item(), abs=1e-4)
    assert "after ppo alone: reward" in printed


def test_7_turns(lesson, monkeypatch):
    own, _ = lesson(6)
    changed, phases = own.lm.lm_head.weight.clone(), []
    first = next(iter(own.reference.parameters()))
    assert not torch.equal(changed, first)

    def phase(name):
        def step(rows):
            phases.append((name, torch.equal(own.lm.lm_head.weight, first)))
            return function(rows)

        function = lesson.space[name]
        return step

    for name in ("sft_loss", "ppo_step"):
        monkeypatch.setitem(lesson.space, name, phase(name))
    _, printed = lesson(7)
    names = [name for name, _ in phases]
    assert names == ["sft_loss", "ppo_step", "sft_loss"]  # the last is that of `show`
    assert phases[0][1] and not phases[1][1], "it begins with the model after SFT, and trains it"
    assert "after turns: reward" in printed
