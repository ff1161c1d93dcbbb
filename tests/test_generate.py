"""The sampler: what it draws is what the scorer scores, whatever the model's own settings say."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from conftest import ARCHITECTURES, build_lm, ragged_batch
from transformers import DynamicCache

from data import decode, make_batch
from generate import draw, generate
from hybrid import HybridModel
from lm import find_cache

EOS = 2


def rescored(model, prompts, responses, temperature):
    batch = make_batch(None, prompts, responses, max_length=64)
    with torch.no_grad():
        scores = model(batch.input_ids, batch.attention_mask, batch.response_mask, temperature)
    return [row[mask].tolist() for row, mask in zip(scores.logprobs, batch.response_mask)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sampler_equals_scorer(architecture, temperature):
    model = HybridModel(build_lm(architecture))
    prompts, _ = ragged_batch()
    generation = generate(
        model,
        prompts,
        max_new_tokens=12,
        eos_token_id=EOS,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )
    for seen, scored in zip(
        generation.logprobs,
        rescored(model, prompts, generation.responses, temperature),
        strict=True,
    ):
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(scored), atol=1e-4, rtol=0)


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("architecture", ["gpt2", "llama", "gemma3_text", "bloom"])
def test_rows_that_ended_leave_the_batch_and_the_rest_goes_on_unharmed(
    architecture, cached, monkeypatch
):
    """With EOS likely the batch shrinks several times; sampler and scorer still agree."""
    model = HybridModel(build_lm(architecture))
    model._cache_name = model._cache_name if cached else None
    logits, sizes = model.logits, []
    eos = torch.zeros(61).index_fill(0, torch.tensor([EOS]), 3.5)
    monkeypatch.setattr(
        model, "logits", lambda hidden, temperature: logits(hidden, temperature) + eos
    )
    read = model.hidden_states
    monkeypatch.setattr(
        model,
        "hidden_states",
        lambda ids, *args, **kwargs: sizes.append(len(ids)) or read(ids, *args, **kwargs),
    )
    prompts = ragged_batch(rows=32)[0]
    generation = generate(
        model,
        prompts,
        max_new_tokens=20,
        eos_token_id=EOS,
        generator=torch.Generator().manual_seed(0),
    )
    assert len(set(sizes)) > 3 and sizes[0] == 32 and sizes == sorted(sizes, reverse=True)
    assert len({len(response) for response in generation.responses}) > 3
    for response in generation.responses:
        assert EOS not in response[:-1] and (response[-1] == EOS or len(response) == 20)
    for seen, scored in zip(
        generation.logprobs, rescored(model, prompts, generation.responses, 1.0), strict=True
    ):
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(scored), atol=1e-4, rtol=0)


def test_a_hostile_generation_config_changes_nothing(model):
    def sample():
        return generate(
            model,
            [[5, 6, 7]] * 64,
            max_new_tokens=8,
            eos_token_id=EOS,
            generator=torch.Generator().manual_seed(0),
        ).responses

    kind = sample()
    settings = dict(
        do_sample=True,
        top_k=1,
        top_p=0.1,
        temperature=0.1,
        repetition_penalty=2.0,
        min_length=5,
        no_repeat_ngram_size=2,
    )
    for name, value in settings.items():
        setattr(model.lm.generation_config, name, value)
    assert sample() == kind
    assert len({tuple(response) for response in kind}) > 1


def test_greedy_equals_hugging_face_one_prompt_at_a_time(model):
    """Cache, left padding and positions are right if greedy tokens are those of HF's own loop."""
    prompts, _ = ragged_batch(seed=3)
    options = dict(max_new_tokens=10, eos_token_id=EOS, temperature=0)
    generation = generate(model, prompts, **options)
    expected = rescored(model, prompts, generation.responses, 1.0)
    for seen, scored in zip(generation.logprobs, expected, strict=True):
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(scored), atol=1e-4, rtol=0)
    for prompt, response in zip(prompts, generation.responses):
        expected = model.lm.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)).long(),
            do_sample=False,
            max_new_tokens=10,
            eos_token_id=EOS,
            pad_token_id=0,
        )
        assert response == expected[0, len(prompt) :].tolist()


def test_an_architecture_without_a_cache_gives_the_same_tokens(model):
    prompts, _ = ragged_batch(seed=4)
    options = dict(max_new_tokens=6, eos_token_id=EOS, temperature=0)
    cached = generate(model, prompts, **options).responses
    model._cache_name = None
    assert generate(model, prompts, **options).responses == cached


class Rigged(torch.nn.Module):
    """Stands in for HybridModel: the next token is 0, 1 or 2 with fixed probabilities."""

    def __init__(self, probabilities):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor(probabilities).log())

    def new_cache(self):
        return DynamicCache()

    def autocast(self):
        return nullcontext()

    def hidden_states(self, input_ids, attention_mask, position_ids=None, cache=None):
        return torch.zeros(*input_ids.shape, 1)

    def logits(self, hidden, temperature):
        return self.weight.expand(len(hidden), -1) / temperature


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_frequencies_are_the_probabilities(temperature):
    probabilities = torch.tensor([0.2, 0.5, 0.3]) ** (1 / temperature)
    probabilities = (probabilities / probabilities.sum()).tolist()
    n = 20_000
    generation = generate(
        Rigged([0.2, 0.5, 0.3]),
        [[1]] * n,
        max_new_tokens=1,
        eos_token_id=9,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
    )
    counts = Counter(response[0] for response in generation.responses)
    for token, p in enumerate(probabilities):
        assert abs(counts[token] / n - p) < 3 * (p * (1 - p) / n) ** 0.5


def test_rows_stop_at_their_first_eos_and_the_limit_truncates_the_rest():
    generation = generate(
        Rigged([0.5, 0.25, 0.25]),
        [[1]] * 200,
        max_new_tokens=5,
        eos_token_id=0,
        generator=torch.Generator().manual_seed(0),
    )
    assert any(response == [0] for response in generation.responses), (
        "an immediate EOS is a response"
    )
    for response, logprobs in zip(generation.responses, generation.logprobs):
        assert len(response) == len(logprobs) <= 5 and 0 not in response[:-1]
        assert response[-1] == 0 or len(response) == 5


def test_training_mode_and_global_random_state_are_left_alone(model):
    model.train()
    state = torch.get_rng_state()
    generate(
        model, [[5]], max_new_tokens=3, eos_token_id=EOS, generator=torch.Generator().manual_seed(0)
    )
    assert model.training and torch.equal(state, torch.get_rng_state())
    model.eval()
    generate(model, [[5]], max_new_tokens=3, eos_token_id=EOS, temperature=0)
    assert not model.training


def test_a_draw_is_the_first_index_whose_cumulative_probability_exceeds_the_number(monkeypatch):
    probs = torch.tensor([[0.0, 0.25, 0.0, 0.5, 0.25, 0.0]]).repeat(5, 1)
    uniform = torch.tensor(
        [[0.0], [0.2499], [0.25], [0.75], [1.0]]
    )  # 1.0: what rounding could make of the largest number below it
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: uniform)
    assert draw(probs).tolist() == [1, 1, 3, 4, 5], (
        "5 only for a number that torch.rand does not draw"
    )


WITHOUT_CACHE = ("mamba", "lfm2", "minimax")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_cache_that_cannot_drop_rows_is_not_used_and_that_is_said_once(
    architecture, capsys, monkeypatch
):
    monkeypatch.setattr("lm._without_cache", set())
    first, second = (HybridModel(build_lm(architecture)) for _ in range(2))
    assert (first.new_cache() is None) == (architecture in WITHOUT_CACHE)
    assert (second.new_cache() is None) == (architecture in WITHOUT_CACHE)
    said = capsys.readouterr().out
    assert said.count("samples without a cache, which is slower: ") == (
        architecture in WITHOUT_CACHE
    ), said


def test_an_lm_that_takes_no_cache_is_said(capsys, monkeypatch):
    monkeypatch.setattr("lm._without_cache", set())
    monkeypatch.setattr("lm.accepts", lambda module: {"input_ids", "attention_mask"})
    assert find_cache(build_lm("llama")) is None
    assert "samples without a cache, which is slower: it takes no Dyn" in capsys.readouterr().out


@pytest.mark.parametrize("fault", ["keeps the wrong row", "forgets a token", "does not select"])
def test_a_cache_whose_step_is_wrong_is_not_used(fault, monkeypatch, capsys):
    """Each fault gives tokens that the scorer would score differently."""
    monkeypatch.setattr("lm._without_cache", set())
    select, update = DynamicCache.batch_select_indices, DynamicCache.update

    def wrong_row(self, indices):
        select(self, indices - 1)

    def forgetful(self, keys, values, *args, **kwargs):
        return update(self, keys, values * (keys.shape[2] > 1), *args, **kwargs)

    def broken(self, indices):
        raise NotImplementedError("rows cannot be dropped")

    if fault == "keeps the wrong row":
        monkeypatch.setattr(DynamicCache, "batch_select_indices", wrong_row)
    elif fault == "forgets a token":
        monkeypatch.setattr(DynamicCache, "update", forgetful)
    else:
        monkeypatch.setattr(DynamicCache, "batch_select_indices", broken)
    model = HybridModel(build_lm("llama"))
    assert model.new_cache() is None
    reason = "rows cannot be dropped" if fault == "does not select" else "gives other states"
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize("architecture", WITHOUT_CACHE)
def test_rows_leave_the_batch_without_a_cache_too(architecture, monkeypatch):
    model = HybridModel(build_lm(architecture))
    monkeypatch.setattr("generate.KEEP_WHILE", 0.99)
    prompts = ragged_batch(rows=16)[0]
    generator = torch.Generator().manual_seed(1)
    ends = list(range(2, 20))  # likely: rows end at different steps
    options = dict(max_new_tokens=8, eos_token_id=ends, generator=generator)
    generation = generate(model, prompts, **options)
    assert len({len(response) for response in generation.responses}) > 3
    expected = rescored(model, prompts, generation.responses, 1.0)
    for seen, scored in zip(generation.logprobs, expected, strict=True):
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(scored), atol=1e-4, rtol=0)


def test_ids_without_a_token_are_sampled_scored_and_decoded_to_nothing(padded_folder):
    """As in the LM's own loss they stay possible: 165 of 640 ids of a random model."""
    model, tokenizer = HybridModel.load(str(padded_folder))
    prompts = [tokenizer(text).input_ids for text in ("the plot was", "the", "the music") * 8]
    generation = generate(
        model,
        prompts,
        max_new_tokens=12,
        eos_token_id=tokenizer.eos_token_id,
        generator=torch.Generator().manual_seed(0),
    )
    ids = [token for response in generation.responses for token in response]
    unknown = [token for token in ids if token >= len(tokenizer)]
    assert 0.15 < len(unknown) / len(ids) < 0.35
    for seen, scored in zip(
        generation.logprobs, rescored(model, prompts, generation.responses, 1.0), strict=True
    ):
        torch.testing.assert_close(torch.tensor(seen), torch.tensor(scored), atol=1e-4, rtol=0)
    for response in generation.responses:
        known = [token for token in response if token < len(tokenizer)]
        assert decode(tokenizer, response).strip() == decode(tokenizer, known).strip()
    assert decode(tokenizer, unknown) == ""
