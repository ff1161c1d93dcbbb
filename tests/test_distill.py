"""Distillation: loss and gradient against the whole vocabulary in float64, a run, its refusals."""

import copy
import json
import shutil

import pytest
import torch
from conftest import FAST, build_lm, ragged_batch
from safetensors.torch import load_file, save_file
from test_runs import taught_rows
from transformers import AutoModelForCausalLM

import distill
from checkpoints import read_state
from data import make_batch
from distill import distill_loss, distill_step, reverse_kl
from flags import parse_args
from health import verdict
from hybrid import HybridModel
from runs import read_rows
from schedules import SCHEDULES
from train import ALGORITHMS, main


@pytest.fixture(params=["llama", "gpt2"])
def pair(request) -> tuple[HybridModel, HybridModel]:
    """Student and teacher: another width, another depth, six rows more in the teacher's head."""
    student = HybridModel(build_lm(request.param))
    size = dict(hidden_size=48, num_hidden_layers=3, vocab_size=67)
    if request.param == "llama":
        size = dict(n_embd=48, n_layer=3, vocab_size=67)
    other = {"llama": "gpt2", "gpt2": "llama"}[request.param]
    return student, HybridModel(build_lm(other, seed=1, **size)).frozen_copy()


def gapped_batch(rows: int = 7):
    """Rows of many lengths; some response columns are off the mask, as the turns of a user are."""
    batch = make_batch(None, *ragged_batch(seed=4, rows=rows), max_length=32)
    batch.response_mask[::2, 6:8] = False
    return batch


def by_hand(student, teacher, batch, temperature) -> tuple[torch.Tensor, dict, dict]:
    """Mean KL, its gradient by parameter, and the stats: row by row, unpadded, in float64."""
    student, teacher = copy.deepcopy(student.lm).double(), copy.deepcopy(teacher.lm).double()
    kls, sampled, entropies = [], [], []
    for ids, real, mask in zip(batch.input_ids, batch.attention_mask, batch.response_mask):
        ids = ids[real][None]
        p_logits, t_logits = student(ids).logits[0], teacher(ids).logits[0, :, :61]
        for column in mask.nonzero().flatten().tolist():
            p = torch.softmax(p_logits[column - 1] / temperature, -1)
            t = torch.softmax(t_logits[column - 1] / temperature, -1)
            terms = [p[v] * (p[v].log() - t[v].log()) for v in range(61)]
            kls.append(sum(terms))
            token = ids[0, column]
            sampled.append((p[token].log() - t[token].log()).detach())
            entropies.append(-(p * p.log()).sum().detach())
    loss = torch.stack(kls).mean()
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters() if not p.requires_grad)
    gradient = {name: p.grad for name, p in student.named_parameters()}
    means = [torch.stack(each).mean().detach() for each in (kls, sampled, entropies)]
    return loss, gradient, dict(zip(("kl", "kl_sampled", "entropy"), means))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_loss_and_gradient_are_those_of_the_whole_vocabulary(pair, monkeypatch, temperature):
    monkeypatch.setattr(distill, "LOGIT_CHUNK", 5)  # 33 tokens: the last chunk is not full
    (student, teacher), batch = pair, gapped_batch()
    assert int(batch.response_mask.sum()) % 5, "the last chunk is to be a small one"
    loss, stats = distill_loss(student, teacher, batch, temperature)
    loss.backward()
    expected, gradient, means = by_hand(student, teacher, batch, temperature)
    expected = expected.detach()
    assert float(expected) > 0.1, "the two models are to differ"
    torch.testing.assert_close(loss.double(), expected, atol=0, rtol=1e-4)
    for name, parameter in student.lm.named_parameters():
        scale = float(gradient[name].abs().max())
        torch.testing.assert_close(
            parameter.grad.double(), gradient[name], atol=1e-4 * scale + 1e-7, rtol=0
        )
    assert stats.keys() == means.keys()
    for name, value in stats.items():
        assert not value.requires_grad
        torch.testing.assert_close(value.double(), means[name], atol=1e-5, rtol=1e-4)
    assert all(p.grad is None for p in teacher.parameters())
    assert student.value_head.weight.grad is None


@pytest.mark.parametrize("chunk, keeps", [(5, False), (1024, True)])
def test_more_than_one_chunk_keeps_no_distribution_for_the_backward_pass(
    pair, monkeypatch, chunk, keeps
):
    monkeypatch.setattr(distill, "LOGIT_CHUNK", chunk)
    (student, teacher), batch, kept = pair, gapped_batch(), []

    def keep(tensor):
        kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        distill_loss(student, teacher, batch)
    assert any(shape[-1:] == (61,) for shape in kept) == keeps
    assert len(kept) > 20


def test_an_update_is_one_mean_over_its_tokens_whatever_the_micro_batches(pair):
    (student, teacher), batch = pair, gapped_batch()
    _, gradient, means = by_hand(student, teacher, batch, 0.7)
    before = copy.deepcopy(student.state_dict())
    options = dict(teacher=teacher, temperature=0.7, micro_batch_size=2, max_grad_norm=1e9)
    metrics = distill_step(
        student, batch, torch.optim.SGD(student.parameters(), lr=1e-3), **options
    )
    for name, parameter in student.lm.named_parameters():
        moved = (before[f"lm.{name}"] - parameter.detach()) / 1e-3
        scale = float(gradient[name].abs().max())
        torch.testing.assert_close(moved.double(), gradient[name], atol=2e-3 * scale + 1e-4, rtol=0)
    assert torch.equal(student.value_head.weight, before["value_head.weight"])
    norm = torch.stack([g.norm() for g in gradient.values()]).norm()
    expected = {f"distill/{name}": float(value) for name, value in means.items()}
    expected |= {"distill/grad_norm": float(norm), "distill/epochs": 1, "distill/skipped_steps": 0}
    assert metrics == pytest.approx(expected, rel=1e-3)


def test_passes_and_minibatches_are_updates(pair):
    (student, teacher), batch = pair, gapped_batch()
    optimizer, updates = torch.optim.SGD(student.parameters(), lr=1e-3), []
    optimizer.register_step_post_hook(lambda *_: updates.append(1))
    metrics = distill_step(student, batch, optimizer, teacher=teacher, ppo_epochs=2, minibatches=3)
    assert len(updates) == 6 and metrics["distill/epochs"] == 2


def test_a_teacher_that_is_the_student_teaches_nothing(pair):
    student = pair[0]
    loss, stats = distill_loss(student, student.frozen_copy(), gapped_batch(), 0.7)
    loss.backward()
    assert abs(float(loss.detach())) < 1e-6 and abs(float(stats["kl_sampled"])) < 1e-5
    largest = max(float(p.grad.abs().max()) for p in student.lm.parameters())
    assert largest < 1e-5
    student.zero_grad()
    other, _ = distill_loss(student, pair[1], gapped_batch(), 0.7)
    other.backward()
    assert max(float(p.grad.abs().max()) for p in student.lm.parameters()) > 1e-2


def test_only_what_stands_before_a_response_token_counts(pair):
    """Padding is never read, and what comes after the last response token is not either."""
    (student, teacher), batch = pair, gapped_batch()
    loss, _ = distill_loss(student, teacher, batch)
    changed = copy.deepcopy(batch)
    changed.input_ids[~batch.attention_mask] = 9
    after = batch.response_mask.flip(1).cumsum(1).flip(1) == 0  # from the last one on
    after |= batch.response_mask & (batch.response_mask.flip(1).cumsum(1).flip(1) == 1)
    changed.input_ids[after] = 11
    assert not torch.equal(changed.input_ids, batch.input_ids)
    torch.testing.assert_close(distill_loss(student, teacher, changed)[0], loss, atol=1e-5, rtol=0)
    changed.input_ids[:, 0] = 13
    other = distill_loss(student, teacher, changed)[0]
    assert abs(float((other - loss).detach())) > 1e-3


def test_the_gradient_of_ppos_spelling_is_the_same_on_average():
    """--kl-coef 1 --gamma 0 --lam 0: the advantage of a token is log p_t - log p_s - baseline."""
    torch.manual_seed(2)
    logits = torch.randn(3, 11, dtype=torch.float64).mul(2).requires_grad_()
    teacher = torch.log_softmax(torch.randn(3, 11, dtype=torch.float64) * 3, -1)
    logps = torch.log_softmax(logits, -1)
    exact = torch.autograd.grad(reverse_kl(logps, teacher).sum(), logits, retain_graph=True)[0]
    baseline = torch.tensor([[0.3], [-2.0], [5.0]], dtype=torch.float64)  # the value head's
    advantages = (teacher - logps).detach() - baseline  # of each token that may be drawn
    drawn = logps.exp().detach()  # how often it is
    surrogate = -(drawn * advantages * torch.exp(logps - logps.detach())).sum()
    torch.testing.assert_close(torch.autograd.grad(surrogate, logits)[0], exact)


# ---- in a run


@pytest.fixture(scope="module")
def teacher_folder(tiny_folder, tmp_path_factory):
    """Another architecture with the vocabulary of `tiny_folder`, sure of what it says."""
    folder = tmp_path_factory.mktemp("teacher")
    shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
    vocabulary = AutoModelForCausalLM.from_pretrained(tiny_folder).config.vocab_size
    lm = build_lm("llama", seed=5, vocab_size=vocabulary + 3, bos_token_id=0, eos_token_id=0)
    with torch.no_grad():
        lm.get_output_embeddings().weight.mul_(6)
    lm.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finished(tiny_folder, teacher_folder, tmp_path_factory):
    """A run of 24 steps with one flag more than the model's: --teacher."""
    out = tmp_path_factory.mktemp("distilled") / "run"
    flags = [*FAST, "--model", tiny_folder, "--max-length", 40, "--teacher", teacher_folder]
    flags += ["--steps", 24, "--batch-size", 8, "--ppo-ratio", 0.75, "--lr", 1e-2]
    flags += ["--save-every", 10, "--out", out]
    main([str(flag) for flag in flags])
    return out


def steps_of(out, phase: str) -> list[dict]:
    rows = [row for row in read_rows(out / "metrics.jsonl") if row["phase"] == phase]
    return [{name: value for name, value in row.items() if name != "seconds"} for row in rows]


def test_a_run_comes_nearer_to_its_teacher(finished):
    rows = steps_of(finished, "distill")
    kl = [row["distill/kl"] for row in rows]
    assert len(rows) == 18 and len(steps_of(finished, "sft")) == 6
    assert kl[0] > 1 and sum(kl[-4:]) / 4 < 0.7 * kl[0]
    assert all(0 <= row["distill/eos_rate"] <= 1 for row in rows)
    assert all(1 <= row["distill/response_length"] <= 6 for row in rows)
    assert all(row["distill/epochs"] == 1 and row["distill/skipped_steps"] == 0 for row in rows)
    assert not any(name.startswith(("ppo/", "reward")) for row in rows for name in row)
    first, last = steps_of(finished, "eval")
    assert last["eval/kl"] < first["eval/kl"], "both are measured against the teacher"
    config = json.loads((finished / "config.json").read_text())
    said = {"algorithm": "distill", "ppo_epochs": 1, "minibatches": 1, "reward": "sentiment"}
    assert said.items() <= config.items()


def test_a_resumed_run_is_the_same_bit_by_bit_and_no_checkpoint_holds_the_teacher(
    finished, tmp_path
):
    out = tmp_path / "again"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("final", "checkpoint-000020"))
    assert read_state(out / "checkpoint-000010")["reference"] is None
    main(["--resume", str(out)])
    for phase in ("sft", "distill", "eval"):
        assert steps_of(out, phase) == steps_of(finished, phase)
    for name in ("model.safetensors", "value_head.safetensors"):
        assert (out / "final" / name).read_bytes() == (finished / "final" / name).read_bytes()


def test_another_teacher_is_refused_in_a_resumed_run(finished, teacher_folder, tmp_path, capsys):
    out, file = tmp_path / "again", teacher_folder / "model.safetensors"
    shutil.copytree(finished, out, ignore=shutil.ignore_patterns("final", "checkpoint-000020"))
    saved = file.read_bytes()
    weights = load_file(file)
    save_file({name: weight * 1.5 for name, weight in weights.items()}, file, {"format": "pt"})
    try:
        with pytest.raises(SystemExit):
            main(["--resume", str(out)])
        error = capsys.readouterr().err
        assert len(error.splitlines()) == 1 and f"--teacher {teacher_folder}" in error
        main(["--resume", str(out), "--accept-changes", "--steps", "11"])
    finally:
        file.write_bytes(saved)
    assert steps_of(out, "distill")[-1] != steps_of(finished, "distill")[-1]


def test_the_plan_says_who_teaches_and_how_long(tiny_folder, teacher_folder, tmp_path, capsys):
    data = tmp_path / "mine.jsonl"
    lines = [{"prompt": f"the film {i}", "target": " was good ."} for i in range(40)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = [*FAST, "--model", tiny_folder, "--max-length", 40, "--teacher", teacher_folder]
    flags += ["--data", data, "--out", tmp_path / "run", "--turns", 1]
    main([str(flag) for flag in flags])
    said = capsys.readouterr().out
    assert f"teacher: {teacher_folder}, 0.0 M parameters, in 3 steps\n" in said
    assert "3 SFT and 3 DISTILL steps of 4; no reward;" in said and "--reward" not in said
    assert "nats a response; model in" in said and "KL to the teacher" in said
    assert not any("eval/reward" in row for row in steps_of(tmp_path / "run", "eval"))
    main([*map(str, flags), "--reward", "length", "--overwrite"])
    assert "measured, not trained on: length" in capsys.readouterr().out
    assert all("eval/reward" in row for row in steps_of(tmp_path / "run", "eval"))
    assert not any("reward/length" in row for row in steps_of(tmp_path / "run", "distill"))


def test_a_reward_that_is_only_measured_changes_no_weight(tiny_folder, teacher_folder, tmp_path):
    flags = [*FAST, "--model", tiny_folder, "--max-length", 40, "--teacher", teacher_folder]
    for reward in ("length", "repetition"):
        main([str(f) for f in [*flags, "--reward", reward, "--out", tmp_path / reward]])
    files = [tmp_path / r / "final" / "model.safetensors" for r in ("length", "repetition")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("more", ["--schedule mix --ppo-ratio 0.3", "--turns 2", "--minibatches 2"])
def test_what_else_goes_with_a_teacher(tiny_folder, teacher_folder, tmp_path, more):
    flags = [*FAST, "--model", tiny_folder, "--max-length", 60, "--teacher", teacher_folder]
    flags += ["--user-model", tiny_folder] if "--turns" in more else []
    main([str(f) for f in [*flags, *more.split(), "--out", tmp_path / "run"]])
    rows = steps_of(tmp_path / "run", "distill")
    assert rows and all(row["distill/grad_norm"] > 0 for row in rows)
    assert all(("distill/sft_loss" in row) == ("mix" in more) for row in rows)


def test_flags_of_ones_own_stand_before_the_defaults_of_the_algorithm():
    def flags(words: str):
        args = parse_args(words.split(), ALGORITHMS, SCHEDULES)
        return args.algorithm, args.ppo_epochs, args.minibatches

    assert flags("") == ("ppo", 2, 2)
    assert flags("--teacher it") == flags("--algorithm distill") == ("distill", 1, 1)
    assert flags("--teacher it --ppo-epochs 2 --minibatches 4") == ("distill", 2, 4)


REFUSED = {
    "--algorithm distill": "--algorithm distill learns from a model: give it one, --teacher MODEL",
    "--teacher {t} --algorithm ppo": "--teacher belongs to distill and does nothing here",
    "--teacher {t} --algorithm dpo": "--teacher belongs to distill and does nothing here",
    "--teacher {t} --algorithm grpo --group-size 2": "--teacher belongs to distill",
    "--teacher {t} --ref-model {t}": "--ref-model is for a reference, and here --teacher is it",
    "--teacher {t} --ref-ema 0.9": "--ref-ema is for a reference, and here --teacher is it",
    "--teacher {t} --ref-refresh 2": "--ref-refresh is for a reference",
    "--teacher {t} --ppo-ratio 0": "--teacher does nothing with --ppo-ratio 0, pure SFT",
    "--teacher {t} --schedule gate": "--schedule gate follows the scores of a reward",
    "--teacher {t} --schedule buffer": "take --schedule ratio or mix",
    "--teacher {t} --kl-coef 0.3": "--kl-coef belongs to ppo and grpo and does nothing here",
    "--teacher {t} --cliprange 0.3": "--cliprange belongs to ppo and grpo",
    "--teacher {t} --target-kl 0.3": "--target-kl belongs to ppo and grpo",
    "--teacher {t} --group-size 2": "--group-size belongs to ppo and grpo",
    "--teacher {t} --gamma 0": "--gamma belongs to ppo",
    "--teacher {t} --model tiny": "has another vocabulary than --model tiny",
    "--teacher {short}": "has a context of 8 tokens; --max-length is 40",
    "--teacher nowhere": "--teacher nowhere",
    "--teacher nowhere --dry-run": "--teacher nowhere has no config that can be read",
}


@pytest.mark.parametrize("flags, message", REFUSED.items(), ids=list(REFUSED))
def test_what_does_not_go_with_a_teacher_is_refused_in_one_line(
    tiny_folder, teacher_folder, tmp_path, capsys, flags, message
):
    short = tmp_path / "short"
    shutil.copytree(tiny_folder, short)
    vocabulary = AutoModelForCausalLM.from_pretrained(short).config.vocab_size
    build_lm("gpt2", n_positions=8, vocab_size=vocabulary).save_pretrained(short)
    words = flags.format(t=teacher_folder, short=short).split()
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        start = [*FAST, "--max-length", "40", "--model", str(tiny_folder)]
        main([*start, "--out", str(tmp_path / "run"), *words])
    error = capsys.readouterr().err
    assert caught.value.code == 2 and len(error.splitlines()) == 1 and message in error
    assert not (tmp_path / "run").exists()


# ---- the verdict


def test_a_run_with_a_teacher_is_healthy_when_its_kl_falls():
    rows = taught_rows()
    assert rows[0]["distill/kl"] > 2 and rows[-1]["distill/entropy"] < 0.2
    for i, row in enumerate(rows):  # the teacher need not write as the data do
        row["eval/nll"] = 1 + i / 10
    evaluations = [
        {"step": i, "phase": "eval", "eval/nll": 1 + i, "reward/a": -i, "eval/distinct": 1.0}
        for i in (0, 1)
    ]
    line = verdict(rows + evaluations)
    assert line.startswith("verdict: healthy (distill/kl 1.7"), line
    assert "distill/response_length" in line


@pytest.mark.parametrize(
    "first, last, is_healthy",
    [(0.5, 0.6, False), (0.5, 0.5, True), (0.5, 0.45, True), (0.05, 0.09, True), (90, 91, False)],
)
def test_a_kl_that_does_not_fall_is_suspect_unless_it_is_small(first, last, is_healthy):
    rows = taught_rows()
    for i, row in enumerate(rows):
        row["distill/kl"] = first if i < len(rows) / 2 else last
    line = verdict(rows)
    assert line.startswith("verdict: healthy") == is_healthy
    assert ("the KL to the teacher does not fall" in line) != is_healthy
