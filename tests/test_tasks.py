"""The built-in tasks: what they ask, measure and bring; few demonstrations; two learning rates."""

import json
import re

import pytest
from conftest import FAST

import letters
import prepare
import sft
import train
from data import load_examples, load_prompts
from engine import UserError
from flags import parse_args
from letters import is_right, letter_metrics, letter_texts
from reviews import review_metrics
from schedules import SCHEDULES
from tasks import task_of
from train import ALGORITHMS, main


def run(tmp_path, *flags, name="run"):
    """A short run; -> (its metrics, the rows of its metrics.jsonl)."""
    metrics = main([*FAST, "--out", str(tmp_path / name), *map(str, flags)])
    lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
    return metrics, [json.loads(line) for line in lines]


# ---- the letters


def test_every_prompt_is_new_and_its_answer_holds_the_same_letters_in_order():
    texts = letter_texts(4000, seed=3)
    assert len({prompt for prompt, _ in texts}) == 4000
    for prompt, answer in texts:
        letters = re.fullmatch(r"sort ((?:[a-s] ){3,5}):", prompt)[1].split()
        assert re.fullmatch(r"( [a-s]){3,5}", answer)
        assert sorted(letters) == answer.split() and len(set(letters)) == len(letters)
    assert texts == letter_texts(4000, seed=3) != letter_texts(4000, seed=4)
    lengths = [len(answer.split()) for _, answer in texts]
    assert all(0.28 < lengths.count(n) / 4000 < 0.37 for n in (3, 4, 5))


def test_there_are_only_so_many_prompts(monkeypatch):
    monkeypatch.setattr(letters, "LETTERS", "abcde")
    assert len(letter_texts(10**6)) == 60 + 120 + 120


@pytest.mark.parametrize(
    "completion, right",
    [
        (" a c f m", True),
        ("  a c  f m\n", True),
        (" a c f", False),  # the m is missing
        (" a c f f m", False),
        (" a f c m", False),
        (" a c f m .", False),
        (" A C F M", False),
        ("acfm", False),
        ("", False),
    ],
)
def test_what_is_right(completion, right):
    assert is_right("sort c f a m :", completion) is right


def test_the_share_of_right_answers():
    prompts = ["sort b a :", "sort d c h :", "sort a i g :"]
    assert letter_metrics(prompts, [" a b", " c d h", " a g"]) == {"right": 2 / 3}


# ---- a task


def test_a_task_is_known_by_its_name():
    assert task_of("sort") is task_of(["sort"]) is not None
    assert task_of("reviews").metrics is review_metrics
    for other in (None, "sort.jsonl", ["sort", "reviews"], [], "Sort"):
        assert task_of(other) is None


def test_sort_has_a_metric_and_a_reward_of_its_own_and_they_agree(tmp_path):
    metrics, rows = run(tmp_path, "--data", "sort", "--demonstrations", 7, "--ppo-ratio", 1)
    first, last = [row for row in rows if row["phase"] == "eval"]
    assert first["eval/right"] == first["eval/reward"] and "eval/right" in last
    assert "reward/exact_match" in next(row for row in rows if row["phase"] == "ppo")
    assert "eval/fluent" not in metrics


def test_right_answers_are_measured_without_a_reward_too(tmp_path):
    metrics, _ = run(tmp_path, "--data", "sort", "--ppo-ratio", 0)
    assert "eval/right" in metrics and "eval/reward" not in metrics


def test_a_task_brings_defaults_and_a_flag_that_is_given_wins():
    flags = parse_args(["--data", "sort", "--batch-size", "7"], ALGORITHMS, SCHEDULES)
    assert (flags.demonstrations, flags.steps, flags.kl_coef) == (100, 500, 0.02)
    assert flags.batch_size == 7
    assert parse_args([], ALGORITHMS, SCHEDULES).demonstrations is None


def test_a_task_brings_no_defaults_into_a_run_that_is_resumed(tmp_path, capsys):
    run(tmp_path, "--limit", 40, "--steps", 1)
    for source, error in (("sort", "--data sort contradicts the run"), ("reviews", None)):
        words = ["--resume", str(tmp_path / "run"), "--data", source, "--steps", "2"]
        if error is None:
            assert parse_args(words, ALGORITHMS, SCHEDULES).steps == 2
        else:
            with pytest.raises(UserError, match=error):
                parse_args(words, ALGORITHMS, SCHEDULES)


def test_the_built_in_model_learns_at_a_rate_of_the_task_and_another_model_does_not(tiny_folder):
    for model, lr, rl_lr, warmup in (("tiny", 1e-3, 6e-4, 83), (str(tiny_folder), 1e-5, 1e-5, 0)):
        flags = parse_args(["--data", "sort", "--model", model], ALGORITHMS, SCHEDULES)
        prepare.resolve_defaults(flags, ALGORITHMS["ppo"], 64)
        assert (flags.lr, flags.rl_lr) == pytest.approx((lr, rl_lr)) and flags.sft_warmup == warmup


# ---- few demonstrations


def test_sft_sees_the_first_targets_alone_and_the_reward_sees_all(tmp_path, monkeypatch, capsys):
    shown, scored = set(), []

    def step(model, batch, *rest, **options):
        shown.update(texts_of(batch))
        return sft.sft_step(model, batch, *rest, **options)

    def texts_of(batch):
        return [
            tuple(ids[mask].tolist())
            for ids, mask in zip(batch.input_ids, batch.response_mask, strict=True)
        ]

    monkeypatch.setattr(train, "sft_step", step)
    reward = tmp_path / "keep.py"
    reward.write_text(
        "def keep(prompts, completions, target):\n"
        f"    with open({str(tmp_path / 'targets')!r}, 'a') as file:\n"
        "        file.writelines(text + '\\n' for text in target)\n"
        "    return [0.25 * len(text) for text in target]\n"
    )
    flags = ("--data", "sort", "--demonstrations", 3, "--steps", 12, "--limit", 40)
    run(tmp_path, *flags, "--reward", f"{reward}:keep")
    scored = (tmp_path / "targets").read_text().splitlines()
    assert len(shown) == 3
    assert len(set(scored)) > 10 and all(scored)
    said = capsys.readouterr()
    assert re.search(r"3 of 3\d training examples have a demonstration", said.out + said.err)


def test_more_demonstrations_than_there_are_is_all_of_them(tmp_path, capsys):
    run(tmp_path, "--demonstrations", 999, "--steps", 1)
    said = capsys.readouterr()
    n = re.search(r"(\d+) of (\d+) training examples have a demonstration", said.out + said.err)
    assert n[1] == n[2]


def test_no_demonstration_leaves_nothing_for_sft(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--demonstrations", 0)
    assert "has no target to learn from: only --ppo-ratio 1 can use it" in capsys.readouterr().err
    run(tmp_path, "--demonstrations", 0, "--ppo-ratio", 1, "--steps", 1)


def test_demonstrations_are_counted_among_the_examples_that_have_one(tmp_path, capsys):
    rows = [{"prompt": f"ask {i}"} for i in range(20)]
    rows += [{"prompt": f"say {i}", "target": f" word {i}"} for i in range(30)]
    data = tmp_path / "half.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run(tmp_path, "--data", data, "--demonstrations", 7, "--steps", 2)
    assert re.search(r"7 of 4\d training examples have a demonstration", capsys.readouterr().out)


def test_preference_pairs_stay_where_demonstrations_are_few():
    flags = parse_args(
        ["--algorithm", "dpo", "--limit", "40", "--demonstrations", "3"], ALGORITHMS, SCHEDULES
    )
    data = prepare.load_data(flags, ALGORITHMS["dpo"])
    assert len(data.pairs) > 20 and sum(bool(e.target) for e in data.train) == 3


def test_chosen_responses_are_demonstrations_too():
    words = ["--algorithm", "dpo", "--preference-data", "examples/prefs.jsonl"]
    flags = parse_args([*words, "--demonstrations", "2"], ALGORITHMS, SCHEDULES)
    data = prepare.load_data(flags, ALGORITHMS["dpo"])
    assert len(data.pairs) > 2 and sum(bool(e.target) for e in data.train) == 2


def test_with_prompts_of_their_own_rewards_ask_no_others(tmp_path):
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps({"prompt": f"ask {i}"}) + "\n" for i in range(20)))
    words = ["--data", "sort", "--limit", "40", "--demonstrations", "3", "--prompts", str(source)]
    data = prepare.load_data(parse_args(words, ALGORITHMS, SCHEDULES), ALGORITHMS["ppo"])
    asked, _ = data.prompts(of_their_own=True)
    assert asked and all(example.prompt.startswith("ask") for example in asked)
    assert sum(bool(example.target) for example in data.train) == 3


def test_prompts_of_a_task_have_no_target():
    texts = load_prompts("sort", limit=9)
    assert [e.prompt for e in texts] == [e.prompt for e in load_examples("sort", limit=9)]
    assert not any(e.target for e in texts) and all(e.columns["target"] for e in texts)


# ---- two learning rates


@pytest.mark.parametrize(
    "flags, phases",
    [
        (["--sft-warmup", 1], ["sft", "sft", "ppo", "sft", "ppo", "sft"]),
        (["--ppo-ratio", 1, "--algorithm", "grpo", "--group-size", 2], ["grpo"] * 6),
        (["--algorithm", "dpo", "--beta", 0.3], ["sft", "dpo"] * 3),
    ],
)
def test_each_phase_has_its_peak_rate_and_the_schedule_scales_both(tmp_path, flags, phases):
    rates = ("--lr", 7e-4, "--rl-lr", 3e-4, "--warmup-steps", 2, "--scheduler", "linear")
    _, rows = run(tmp_path, *flags, *rates)
    steps = [row for row in rows if row["phase"] != "eval"]
    if "dpo" not in phases:
        assert [row["phase"] for row in steps] == phases
    factors = [1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4]
    for row, factor in zip(steps, factors, strict=True):
        peak = 7e-4 if row["phase"] == "sft" else 3e-4
        assert row["lr"] == pytest.approx(peak * factor)


def test_the_optimiser_has_the_rate_of_the_phase_when_it_steps(tmp_path, monkeypatch):
    """Also in the two updates of a gate's step: those on the reward, then SFT on hard prompts."""
    seen = []

    def spy(name, real):
        def step(model, batch, optimizer, **options):
            seen.append((name, {group["lr"] for group in optimizer.param_groups}))
            return real(model, batch, optimizer, **options)

        return step

    monkeypatch.setattr(train, "sft_step", spy("sft", train.sft_step))
    ppo = ALGORITHMS["ppo"]
    monkeypatch.setitem(
        ALGORITHMS, "ppo", train.Algorithm(**{**vars(ppo), "step": spy("ppo", ppo.step)})
    )
    flags = ("--schedule", "gate", "--threshold", 0.7, "--scheduler", "constant")
    run(tmp_path, *flags, "--sft-warmup", 1, "--lr", 7e-4, "--rl-lr", 3e-4, "--steps", 3)
    assert seen[:3] == [("sft", {7e-4}), ("ppo", {3e-4}), ("sft", {7e-4})]


def test_a_resumed_run_keeps_both_rates(tmp_path):
    flags = ("--lr", 7e-4, "--rl-lr", 3e-4, "--sft-warmup", 1)
    whole, rows = run(tmp_path, *flags, name="whole")
    run(tmp_path, *flags, "--save-every", 3, name="cut")
    for row in [r for r in rows if r["phase"] == "ppo"]:
        assert row["lr"] <= 3e-4
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert (config["lr"], config["rl_lr"]) == (7e-4, 3e-4)
