"""What evaluate.py --model says of a finished model, and how train.py measures dialogues."""

import copy
import itertools
import json
import math
from fractions import Fraction

import pytest
import torch
from conftest import FAST
from test_dialogue import question
from transformers import AutoModelForCausalLM, AutoTokenizer

import train
from dialogue import scripted_user
from evaluate import main
from generate import generate
from hybrid import HybridModel
from measure_model import evaluate, pass_at_k, pass_rates
from ppo import collect_rollout
from runs import read_rows


def test_pass_at_k_is_the_share_of_draws_with_one_that_passes():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                draws = list(itertools.combinations([True] * c + [False] * (n - c), k))
                share = Fraction(sum(any(draw) for draw in draws), len(draws))
                assert pass_at_k(n, c, k) == pytest.approx(float(share), abs=1e-12)


def test_pass_rates_are_means_over_prompts_whose_responses_all_have_a_score(capsys):
    scores = [0.9, 1.0, 0.2, 1.5, 0.0, 3.0] + [0.0] * 6 + [2.0] * 5 + [None] + [1.0] * 6
    samples = [{} if score is None else {"score": score} for score in scores]
    # 3, 0 and 6 of 6 pass. Of the 15 pairs from the first six, 3 hold none that passes.
    assert pass_rates(samples, 6, pass_score=1.0) == pytest.approx(
        {"eval/pass@1": (0.5 + 0 + 1) / 3, "eval/pass@2": (12 / 15 + 1) / 3, "eval/pass@4": 2 / 3}
    )
    assert "1 prompts have a response without a score" in capsys.readouterr().out
    assert pass_rates([{}, {}], 2, 1.0) == {}


def numbers(capsys) -> dict[str, float]:
    """The lines `name value`."""
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    return {words[0]: float(words[1]) for words in lines if words[0].startswith("eval/")}


def test_a_finished_model_measures_what_the_end_of_its_run_measured(tmp_path, capsys):
    flags = "--limit 90 --max-new-tokens 7 --seed 3 --device cpu --temperature 0.8".split()
    flags += ["--reward", "sentiment - 0.5*length"]
    out = tmp_path / "run"
    run = "--steps 4 --sft-warmup 2 --batch-size 5 --eval-every 0".split()
    last = train.main([*flags, *run, "--out", str(out)])
    capsys.readouterr()
    command = ["--model", str(out / "final"), "--data", "reviews", *flags, "--batch-size", "5"]
    main([*command, "--held-out", "--json", str(tmp_path / "n.json")])
    exact = json.loads((tmp_path / "n.json").read_text())
    assert numbers(capsys) == pytest.approx(exact, rel=1e-5)
    assert set(last) - set(exact) == {"eval/kl"} and set(exact) - set(last) == {"eval/eos_rate"}
    same = {name: value for name, value in exact.items() if name in last}
    assert same == {name: last[name] for name in same}
    main(command)
    assert numbers(capsys)["eval/nll"] != exact["eval/nll"], "now all 90, and not the tenth"


def test_the_numbers_of_a_file_by_hugging_faces_loss_and_by_the_sampler(
    tmp_path, tiny_folder, capsys
):
    rows = [
        {"prompt": "the plot was", "target": " warm and bold"},
        {"prompt": "the cast"},
        {"prompt": "the music felt really", "target": " dull"},
    ]
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"nothing": 1}\n')
    command = ["--model", tiny_folder, "--data", data, "--max-new-tokens", 30, "--samples", 2]
    command += ["--seed", 5, "--device", "cpu", "--reward", "length(target=9)"]
    main([*map(str, command), "--pass-score", "0.5"])
    said = capsys.readouterr()
    assert "measured: all 3 examples" in said.out and "1 of 4 records" in said.err
    found = {}
    for line in said.out.splitlines():
        if line.startswith("eval/"):
            found[line.split()[0]] = float(line.split()[1])

    lm = AutoModelForCausalLM.from_pretrained(tiny_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    total = count = 0
    for row in (rows[0], rows[2]):
        prompt, target = tokenizer(row["prompt"]).input_ids, tokenizer(row["target"]).input_ids
        target.append(tokenizer.eos_token_id)
        labels = torch.tensor([[-100] * len(prompt) + target])
        loss = lm(input_ids=torch.tensor([prompt + target]), labels=labels).loss
        total, count = total + loss.item() * len(target), count + len(target)
    assert found["eval/nll"] == pytest.approx(total / count, rel=1e-4)

    prompts = [tokenizer(row["prompt"]).input_ids for row in rows for _ in range(2)]
    responses = generate(
        HybridModel(lm), prompts, max_new_tokens=30, eos_token_id=tokenizer.eos_token_id,
        generator=torch.Generator().manual_seed(5),
    ).responses  # fmt: skip
    ended = [response[-1] == tokenizer.eos_token_id for response in responses]
    assert found["eval/eos_rate"] == pytest.approx(sum(ended) / 6, rel=1e-5)
    assert found["eval/response_length"] == pytest.approx(sum(map(len, responses)) / 6, rel=1e-5)
    texts = tokenizer.batch_decode(responses, skip_special_tokens=True)
    assert found["eval/distinct"] == pytest.approx(len(set(texts)) / 6, rel=1e-5)
    assert {"eval/pass@1", "eval/pass@2"} <= set(found) and "eval/pass@4" not in found


@pytest.mark.parametrize("turn_rewards", [False, True])
def test_dialogues_are_sampled_and_scored_as_training_does(tiny, turn_rewards):
    model, tokenizer = HybridModel(copy.deepcopy(tiny[0])), tiny[1]
    examples = [
        question("the plot was", "and the ending ?"),
        question("one turn only"),
        question("the cast", "why ?", "never asked"),
    ]
    asked = []

    class LengthReward:
        def __call__(self, prompts, completions, **columns):
            asked.append((prompts, completions))
            return torch.tensor([float(len(text)) for text in completions])

        def frozen(self):
            return torch.no_grad()

        def metrics(self):
            return {}

    lengths = dict(max_length=200, max_new_tokens=6, temperature=0.9)
    talk = dict(turns=2, user=scripted_user, turn_rewards=turn_rewards)
    generator = torch.Generator().manual_seed(4)
    _, ppo = collect_rollout(
        model, model.frozen_copy(), tokenizer, examples, LengthReward(), kl_coef=0.1,
        generator=generator, **lengths, **talk,
    )  # fmt: skip
    metrics, samples, _ = evaluate(
        model, tokenizer, examples, reward=LengthReward(), reference=model.frozen_copy(),
        batch_size=3, micro_batch_size=2, seed=4, task=None, **lengths, **talk,
    )  # fmt: skip
    assert asked[0] == asked[1] and len(asked[0][0]) == (5 if turn_rewards else 3)
    assert metrics["eval/reward"] == pytest.approx(ppo["ppo/score"])
    for name in ("response_length", "turns", "kl"):
        assert metrics[f"eval/{name}"] == pytest.approx(ppo[f"ppo/{name}"], abs=1e-6)
    assert metrics["eval/turns"] == pytest.approx(5 / 3)
    assert "\n\nUser:\nand the ending ?\n\nAssistant:\n" in samples[0]["response"]
    if turn_rewards:
        texts = asked[1][1]
        assert samples[0]["score"] == (len(texts[0]) + len(texts[1])) / 2
    # With one turn the same call measures first answers only.
    first, rows, _ = evaluate(
        model, tokenizer, examples, reward=None, reference=None, batch_size=3, micro_batch_size=2,
        seed=4, task=None, **lengths,
    )  # fmt: skip
    assert "eval/turns" not in first and "User:" not in rows[0]["response"]


def test_a_run_of_dialogues_logs_measurements_of_whole_dialogues(tmp_path):
    data = tmp_path / "questions.jsonl"
    record = {"turns": ["the plot was", "and ?"]}
    data.write_text(json.dumps(record) + "\n" + json.dumps({"turns": ["the end", "why ?"]}) + "\n")
    flags = "--turns 2 --turn-rewards --reward length --ppo-ratio 1 --steps 1".split()
    train.main([*FAST, *flags, "--data", str(data), "--out", str(tmp_path / "run")])
    rows = [row for row in read_rows(tmp_path / "run/metrics.jsonl") if row["phase"] == "eval"]
    assert [row["eval/turns"] for row in rows] == [2, 2]
    samples = read_rows(tmp_path / "run/samples.jsonl")
    assert all("\n\nUser:\n" in row["response"] and "score" in row for row in samples)


def test_mistakes_are_one_line_before_anything_is_sampled(tmp_path, tiny_folder, capsys):
    data = tmp_path / "d.jsonl"
    data.write_text('{"prompt": "the plot", "target": " was dull"}\n')
    model = ["--model", tiny_folder, "--data", data, "--device", "cpu"]
    for flags, message in (
        (model[:2], "go together"),
        (model[2:4], "say --health OUT"),
        ([*model, "--perplexity", "gpt2"], "say one of the two"),
        (["--health", tmp_path, "--samples", 3], "--samples is for --model"),
        (["--perplexity", "gpt2", *model[2:4], "--raw"], "--raw is for --model"),
        ([*model, "--samples", 3], "which needs a --reward"),
        ([*model, "--samples", 3, "--reward", "length", "--temperature", 0], "3 equal responses"),
        ([*model, "--json", data], "already exists"),
        ([*model, "--json", tmp_path / "no" / "x.json"], "there is no folder"),
        ([*model, "--max-length", 65], "beyond the model's context of 64"),
        ([*model, "--turns", 2], "--turns 2 of --max-new-tokens 32 leave no room for a prompt"),
        ([*model, "--turns", 2, "--max-new-tokens", 8], "says what the user replies"),
        ([*model, "--turn-rewards"], "give --turns above 1"),
        ([*model, "--reward", "rouge_9"], "cannot read 'rouge_9'"),
        ([*model, "--reward", "self_play(length)"], "it works in train.py only"),
        ([*model, "--reward", "numeric", "--target-field", "nothing"], "nothing"),
    ):
        with pytest.raises(SystemExit) as caught:
            main([str(word) for word in flags])
        err = capsys.readouterr().err
        assert caught.value.code == 2 and message in err[err.index("error: ") :], flags
        assert err.count("error: ") == 1


def test_a_score_that_is_missing_is_no_nan_in_the_file(tmp_path, tiny_folder, capsys, monkeypatch):
    class Silent:
        def __call__(self, prompts, completions, **columns):
            return torch.full((len(completions),), math.nan)

        def frozen(self):
            return torch.no_grad()

        def metrics(self):
            return {"reward/judge": math.nan}

    monkeypatch.setattr("measure_model.load_reward", lambda *args: Silent())
    (tmp_path / "d.jsonl").write_text('{"prompt": "the plot"}\n')
    flags = ["--model", tiny_folder, "--data", tmp_path / "d.jsonl", "--json", tmp_path / "n.json"]
    main([*map(str, flags), "--reward", "length", "--samples", "2", "--device", "cpu"])
    written = json.loads((tmp_path / "n.json").read_text())
    assert {"eval/distinct", "eval/eos_rate"} <= set(written)
    assert not {"eval/reward", "eval/reward/judge", "eval/pass@1", "eval/nll"} & set(written)


def test_a_greedy_measurement_takes_the_most_likely_tokens(tmp_path, tiny_folder, capsys):
    (tmp_path / "d.jsonl").write_text('{"prompt": "the plot"}\n{"prompt": "the cast was"}\n')
    flags = ["--model", tiny_folder, "--data", tmp_path / "d.jsonl", "--temperature", 0]
    found = []
    for seed in (1, 2):
        main([*map(str, flags), "--seed", str(seed), "--device", "cpu"])
        found.append(numbers(capsys))
    assert found[0] == found[1]
