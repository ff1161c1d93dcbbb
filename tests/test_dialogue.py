"""Dialogues of several turns: the row token by token, what is trained, where the scores stand."""

import argparse
import copy
import json

import pytest
import torch
from conftest import SHARED

from data import Example, load_examples, render_dialogue
from dialogue import (
    Episode,
    ModelUser,
    check_flags,
    load_user,
    sample_episodes,
    scripted_user,
    text_between,
)
from engine import UserError
from flags import add_dialogue_flags
from hybrid import HybridModel
from ppo import collect_rollout, ppo_step
from runs import read_rows
from train import main

CHATML = (
    "{% if bos_token %}{{ bos_token }}{% endif %}"
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
LENGTHS = dict(max_length=200, max_new_tokens=6)


@pytest.fixture
def policy(tiny):
    return HybridModel(copy.deepcopy(tiny[0])), copy.deepcopy(tiny[1])


def question(*turns: str, **columns) -> Example:
    messages = [{"role": "user", "content": turns[0]}]
    return Example(render_dialogue(messages), "", columns, messages, tuple(turns[1:]))


def seeded(n: int = 0):
    return torch.Generator().manual_seed(n)


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_row_is_the_rendered_dialogue_and_only_the_policys_tokens_are_its_own(policy, template):
    model, tokenizer = policy
    tokenizer.chat_template = template
    if template:
        tokenizer.bos_token = tokenizer.eos_token
    [episode] = sample_episodes(
        model,
        tokenizer,
        [question("the plot was", "and the ending ?", "why ?")],
        turns=3,
        user=scripted_user,
        generator=seeded(),
        **LENGTHS,
    )
    assert len(episode.responses) == 3 and len(episode.ids) == len(episode.response_mask)
    assert [m["role"] for m in episode.messages] == ["user", "assistant"] * 3
    text = tokenizer.decode(episode.ids)
    at = 0
    for piece in (
        "the plot was",
        episode.responses[0],
        "and the ending ?",
        episode.responses[1],
        "why ?",
        episode.responses[2],
    ):
        at = text.index(piece, at) + len(piece)
    # the spans hold exactly the sampled tokens
    spans, start = [], 0
    for end in episode.ends:
        start = next(i for i in range(start, end + 1) if episode.response_mask[i])
        spans.append(tokenizer.decode(episode.ids[start : end + 1], skip_special_tokens=True))
        start = end + 1
    assert spans == episode.responses and sum(episode.response_mask) == len(episode.logprobs)
    if template:
        bos = tokenizer.bos_token
        assert (
            text.startswith(bos + "<|user|>the plot was")
            and text.count(bos + "<|user|>the plot was") == 1
        )
        for response, truncated in zip(episode.responses, episode.truncated):
            assert (response + tokenizer.eos_token * 2 not in text) or truncated, (
                "an EOS that was sampled is not said twice"
            )
        assert text_between(tokenizer, episode, "x").endswith(
            "<|user|>x" + tokenizer.eos_token + "<|assistant|>"
        )


def test_an_eos_behind_a_space_is_not_said_twice_either(policy):
    """Llama 2's template writes ' ' + content + ' ' + EOS."""
    _, tokenizer = policy
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {{ eos_token }}{% endfor %}"
    )
    episode = Episode(
        question("a"),
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        [1],
        [False],
        truncated=[False],
    )
    assert text_between(tokenizer, episode, "next") == f"[user] next {tokenizer.eos_token}"
    episode.truncated = [True]
    assert (
        text_between(tokenizer, episode, "next")
        == f" {tokenizer.eos_token}[user] next {tokenizer.eos_token}"
    )


def test_the_sampler_equals_the_scorer_over_all_turns(policy):
    model, tokenizer = policy
    examples = [
        question("the plot was", "and ?", "so ?"),
        question("hi", "the cast ?"),
        question("one turn only"),
    ]
    rollout, metrics = collect_rollout(
        model,
        model.frozen_copy(),
        tokenizer,
        examples,
        lambda p, c, **k: torch.zeros(len(c)),
        kl_coef=0.1,
        turns=3,
        user=scripted_user,
        generator=seeded(),
        **LENGTHS,
    )
    assert metrics["ppo/sampler_gap"] < 1e-4 and metrics["ppo/kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["ppo/turns"] == 2.0, "three, two and one"
    spans = [(row[1:] & ~row[:-1]).sum().item() for row in rollout.response_mask]
    assert spans == [3, 2, 1], "the user's turns are not the policy's"
    metrics = ppo_step(
        model, rollout, torch.optim.SGD(model.parameters(), lr=0.0), micro_batch_size=1
    )
    assert metrics["ppo/first_ratio_gap"] < 1e-5


def test_one_score_at_the_end_or_one_for_each_turn(policy):
    model, tokenizer = policy
    examples = [question("the plot was", "and ?"), question("one turn only")]
    asked = {}

    def reward(prompts, completions, **columns):
        asked.update(prompts=prompts, completions=completions, topic=columns["topic"])
        return torch.arange(1.0, len(completions) + 1)

    examples = [
        Example(e.prompt, e.target, {"topic": str(i)}, e.messages, e.user_turns)
        for i, e in enumerate(examples)
    ]
    options = dict(kl_coef=0.0, turns=2, user=scripted_user, **LENGTHS)
    rollout, metrics = collect_rollout(
        model, model.frozen_copy(), tokenizer, examples, reward, generator=seeded(), **options
    )
    assert metrics["ppo/turns"] == 1.5 and metrics["ppo/response_length"] > 1
    last = [int(row.nonzero()[-1]) for row in rollout.response_mask]
    assert rollout.rewards.nonzero().tolist() == [
        [0, last[0]],
        [1, last[1]],
    ] and rollout.rewards.sum(1).tolist() == [1, 2]
    assert (
        asked["prompts"] == [e.prompt for e in examples]
        and "\n\nUser:\nand ?\n\nAssistant:\n" in asked["completions"][0]
    )

    rollout, _ = collect_rollout(
        model,
        model.frozen_copy(),
        tokenizer,
        examples,
        reward,
        turn_rewards=True,
        generator=seeded(),
        **options,
    )
    assert asked["topic"] == ["0", "0", "1"] and asked["prompts"][0] == examples[0].prompt
    assert asked["prompts"][1].startswith(examples[0].prompt + asked["completions"][0]) and asked[
        "prompts"
    ][1].endswith("User:\nand ?\n\nAssistant:\n")
    assert rollout.rewards[rollout.rewards != 0].tolist() == [1, 2, 3]
    first_end = [
        i
        for i in range(rollout.response_mask.shape[1] - 1)
        if rollout.response_mask[0, i] and not rollout.response_mask[0, i + 1]
    ][0]
    assert rollout.rewards[0, first_end] == 1 and rollout.rewards[0, last[0]] == 2


def test_a_truncated_turn_is_penalised_at_its_own_end(policy):
    model, tokenizer = policy
    logits = model.logits
    never = torch.zeros(len(tokenizer)).index_fill(0, torch.tensor([tokenizer.eos_token_id]), -1e9)
    model.logits = lambda hidden, temperature=1.0: logits(hidden, temperature) + never
    examples = [question("the plot was", "and ?")]
    rollout, metrics = collect_rollout(
        model,
        model.frozen_copy(),
        tokenizer,
        examples,
        lambda p, c, **k: torch.zeros(1),
        kl_coef=0.0,
        turns=2,
        user=scripted_user,
        missing_eos_penalty=0.5,
        generator=seeded(),
        **LENGTHS,
    )
    assert metrics["ppo/eos_rate"] == 0 and rollout.rewards[rollout.rewards != 0].tolist() == [
        -0.5,
        -0.5,
    ]


def test_a_full_row_ends_the_dialogue_and_a_model_can_play_the_user(policy):
    model, tokenizer = policy
    [episode] = sample_episodes(
        model,
        tokenizer,
        [question("a", *["and what then ?"] * 9)],
        turns=9,
        user=scripted_user,
        generator=seeded(),
        max_length=100,
        max_new_tokens=6,
    )
    assert 1 < len(episode.responses) < 9 and len(episode.ids) <= 100
    [episode] = sample_episodes(
        model,
        tokenizer,
        [Example("the plot was", " warm .")],
        turns=2,
        user=ModelUser(model, tokenizer, 8),
        generator=seeded(),
        **LENGTHS,
    )
    said = [m["content"] for m in episode.messages if m["role"] == "user"]
    assert len(said) == 2 and said[1] and "\n\n" not in said[1]


def test_user_turns_come_from_messages_and_from_turns(tmp_path):
    record = {
        "messages": [
            {"role": r, "content": c}
            for r, c in [
                ("user", "a"),
                ("assistant", "b"),
                ("user", "c"),
                ("assistant", "d"),
                ("user", "e"),
            ]
        ]
    }
    (tmp_path / "m.jsonl").write_text(
        json.dumps(record)
        + "\n"
        + json.dumps({"turns": ["q1", "q2"], "category": "math", "reference": ["r1", "r2"]})
        + "\n"
    )
    examples = load_examples(str(tmp_path / "m.jsonl"))
    assert [e.user_turns for e in examples] == [("c", "e"), ("e",), ("q2",)]
    assert (
        examples[2].target == "r1"
        and examples[2].messages == [{"role": "user", "content": "q1"}]
        and examples[2].columns == {"category": "math"}
    )


RUN = (
    "--ppo-ratio 1 --steps 3 --batch-size 4 --eval-size 4 --max-new-tokens 6 --max-length 120 "
    "--device cpu --reward length --save-every 0"
).split()


def test_questions_without_answers_serve_ppo_alone(tmp_path, capsys):
    data = tmp_path / "questions.jsonl"
    data.write_text(
        "".join(json.dumps({"turns": [f"question {i} ?", "and then ?"]}) + "\n" for i in range(20))
    )
    metrics = main([*RUN, "--data", str(data), "--turns", "2", "--out", str(tmp_path / "run")])
    assert "eval/nll" not in metrics and "no target to measure an NLL on" in capsys.readouterr().out
    for flags, message in (
        (["--ppo-ratio", "0.5"], "has no target to learn from"),
        (["--turns", "30"], "leave no room for a prompt"),
    ):
        with pytest.raises(SystemExit):
            main([*RUN, "--data", str(data), *flags, "--out", str(tmp_path / "no")])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*RUN, "--turns", "2", "--out", str(tmp_path / "no")])
    assert "says what the user replies" in capsys.readouterr().err


def test_flags_are_read_checked_and_name_the_user(tiny_folder):
    parser = argparse.ArgumentParser()
    add_dialogue_flags(parser)
    run = dict(schedule="ratio", hints=None, max_new_tokens=10, max_length=40)
    one = argparse.Namespace(**vars(parser.parse_args([])), **run)
    check_flags(one)
    assert one.turns == 1 and load_user(one, torch.device("cpu")) is scripted_user
    words = ["--turns", "3", "--user-model", str(tiny_folder), "--turn-rewards"]
    args = argparse.Namespace(**vars(parser.parse_args(words)), **run)
    check_flags(args)
    user = load_user(args, torch.device("cpu"))
    assert isinstance(user, ModelUser) and user.max_new_tokens == 10
    for change, message in (
        (dict(turns=1), "are for dialogues"),
        (dict(schedule="gate"), "goes with --schedule ratio or mix"),
        (dict(hints=0.5), "without --hints"),
        (dict(turns=4), "--turns 4 of --max-new-tokens 10 leave no room for a prompt"),
    ):
        with pytest.raises(UserError, match=message):
            check_flags(argparse.Namespace(**{**vars(args), **change}))
    args.max_new_tokens = 64
    with pytest.raises(UserError, match="context of 64 tokens, no room for a dialogue"):
        load_user(args, torch.device("cpu"))


def test_mt_bench_with_a_real_model_on_both_sides(tmp_path, shared):
    real = str(SHARED / "stories260K")
    flags = [
        "--data",
        str(SHARED / "multi_turn" / "mt_bench_question.jsonl"),
        "--model",
        real,
        "--user-model",
        real,
        "--turns",
        "3",
        "--turn-rewards",
    ]
    main([*RUN, *flags, "--max-length", "200", "--out", str(tmp_path / "run")])
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.jsonl") if row["phase"] == "ppo"]
    assert all(row["ppo/sampler_gap"] < 1e-3 and row["ppo/first_ratio_gap"] < 1e-4 for row in rows)
