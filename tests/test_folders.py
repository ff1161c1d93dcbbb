"""A run folder: what may be deleted in it, who may write to it, and what a resumed run compares."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import FAST, ROOT

import fingerprint
import train
from checkpoints import (
    NEW,
    TEMPORARY,
    append_rows,
    newest_checkpoint,
    read_rows,
    recover,
    replace_old_run,
)
from cli import UserError
from evaluate import measure
from flags import parse_args
from lm import load_tokenizer
from lock import LOCK_FILE, one_writer
from schedules import SCHEDULES
from train import ALGORITHMS, main

SAVED = [*FAST, "--steps", "4", "--sft-warmup", "1", "--save-every", "2"]
FOREIGN = (
    "notes.txt", "checkpoint-notes.md", "checkpoint-best/weights.bin", "checkpoint-12b/x",
    ".git/HEAD", ".vimrc.old", ".draft.tmp", ".final-idea.old/text", "final.md",
    "best-of/list", "new/plan", ".new/plan",
)  # fmt: skip


def error_of(capsys, *flags) -> str:
    """The one line that `main` ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([str(flag) for flag in flags])
    lines = capsys.readouterr().err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    assert caught.value.code == 2 and len(errors) == 1, lines
    return errors[0]


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture(scope="module")
def a_run(tmp_path_factory) -> Path:
    """A run of four steps, with checkpoints and a final model. Copy it; do not change it."""
    out = tmp_path_factory.mktemp("folders") / "run"
    main([*SAVED, "--out", str(out)])
    return out


# ------------------------------------------------------------------------------ what may be deleted


def test_only_what_a_run_wrote_is_ever_deleted(a_run, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(a_run, out)
    for name in FOREIGN:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text(f"mine: {name}", encoding="utf-8")
    for name in (".checkpoint-000004.tmp", ".final.old", ".metrics.jsonl.tmp"):  # of a killed run
        (out / name).mkdir()
    main(["--resume", str(out), "--steps", "6", "--keep", "1"])
    assert not list(out.glob(".checkpoint*")) and not (out / ".final.old").exists()
    main([*SAVED, "--out", str(out), "--overwrite"])
    for name in FOREIGN:
        assert (out / name).read_text(encoding="utf-8") == f"mine: {name}"
    written = {path.name for path in out.iterdir()} - {name.split("/")[0] for name in FOREIGN}
    assert written == {path.name for path in a_run.iterdir()}
    assert read_rows(out / "metrics.jsonl")[-1]["step"] == 4


@pytest.mark.parametrize(
    "name, ours",
    [
        (".config.json.tmp", True),
        (".final.old", True),
        (".checkpoint-000200.tmp", True),
        (".checkpoint-best.tmp", False),
        (".checkpoint-12b.old", False),
        ("config.json.tmp", False),
        (".notes.tmp", False),
        (".final.old2", False),
    ],
)
def test_names_of_leftovers(name, ours):
    assert bool(TEMPORARY.fullmatch(name)) == ours


def test_a_folder_that_is_no_run_of_ours_is_left_alone(tiny_folder, tmp_path, capsys):
    shutil.copytree(tiny_folder, tmp_path / "model")
    (tmp_path / "trl" / "checkpoint-500").mkdir(parents=True)
    (tmp_path / "trl" / "checkpoint-500" / "model.bin").write_text("w", encoding="utf-8")
    for name, told in [("model", "holds a model, and no run"), ("trl", "none of train.py")]:
        before = contents(tmp_path / name)
        for flags in ([], ["--overwrite"]):
            assert told in error_of(capsys, *SAVED, "--out", tmp_path / name, *flags)
        assert contents(tmp_path / name) == before


def test_overwrite_keeps_the_old_run_until_the_new_one_was_measured(a_run, tmp_path, capsys):
    """The reward passes its trial and raises at the first evaluation."""
    out = tmp_path / "run"
    shutil.copytree(a_run, out)
    (tmp_path / "r.py").write_text(
        "calls = []\n\n\ndef second(prompts, completions, **columns):\n"
        "    calls.append(1)\n    assert len(calls) < 2, 'second call'\n"
        "    return [0.25] * len(completions)\n",
        encoding="utf-8",
    )
    flags = [*SAVED, "--out", out, "--overwrite", "--reward", f"{tmp_path}/r.py:second"]
    assert "second call" in error_of(capsys, *flags)
    kept = {name: text for name, text in contents(out).items() if not name.startswith(f"{NEW}/")}
    assert kept == contents(a_run)
    main(["--resume", str(out), "--steps", "5"])
    assert not (out / NEW).exists() and read_rows(out / "metrics.jsonl")[-1]["step"] == 5


def test_overwrite_deletes_nothing_that_the_new_run_reads(a_run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(a_run, out)
    (out / "final" / "r.py").write_text(
        "def f(prompts, completions, **columns):\n    return [0.5 for _ in completions]\n",
        encoding="utf-8",
    )
    before = contents(out)
    again = [*SAVED, "--out", out, "--overwrite"]
    for flag, path in [
        ("--model", f"{out}/final"),
        ("--model", out),
        ("--ref-model", f"a={out}/checkpoint-000002:0.5"),
        ("--data", out / "samples.jsonl"),
        ("--reward", f"0.5*{out}/final/r.py:f + length"),
    ]:
        told = error_of(capsys, *again, flag, path)
        assert f"error: {flag} " in told and "--overwrite would delete" in told
    assert contents(out) == before


def test_final_may_be_a_symbolic_link(a_run, tmp_path):
    out, elsewhere = tmp_path / "run", tmp_path / "big disk" / "final"
    shutil.copytree(a_run, out)
    elsewhere.parent.mkdir()
    shutil.move(out / "final", elsewhere)
    (out / "final").symlink_to(elsewhere, target_is_directory=True)
    before = contents(elsewhere)
    main(["--resume", str(out), "--steps", "5"])
    assert not (out / "final").is_symlink() and (out / "final" / "config.json").is_file()
    (out / "best").symlink_to(elsewhere, target_is_directory=True)
    main([*SAVED, "--out", str(out), "--overwrite"])
    assert contents(elsewhere) == before and not (out / "best").is_symlink()


def test_a_half_deleted_final_never_gets_its_name_back(a_run, tmp_path, monkeypatch, capsys):
    """The old `final` is being deleted when the process dies; then the disk refuses."""
    out = tmp_path / "run"
    rmtree = shutil.rmtree
    for problem, told in [(KeyboardInterrupt(), None), (OSError(16, "busy"), "cannot be deleted")]:
        rmtree(out, ignore_errors=True)
        shutil.copytree(a_run, out)
        (out / NEW).mkdir()
        (out / NEW / "config.json").write_text('{"ppo_ratio": 0.5}', encoding="utf-8")

        def dies(path, problem=problem):
            if "final" in path.name:
                (path / "model.safetensors").unlink()
                raise problem
            rmtree(path)

        monkeypatch.setattr(shutil, "rmtree", dies)
        with pytest.raises(UserError if told else KeyboardInterrupt, match=told):
            replace_old_run(out)
        monkeypatch.setattr(shutil, "rmtree", rmtree)
        recover(out)
        assert not (out / "final").exists() and (out / "config.json").is_file()
        assert newest_checkpoint(out) in (None, out / "checkpoint-000002")


def test_ctrl_c_before_the_first_step_keeps_the_old_run(a_run, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(a_run, out)

    def measured(run, args, folder):
        os.kill(os.getpid(), signal.SIGINT)
        measure(run, args, folder)

    monkeypatch.setattr(train, "measure", measured)
    with pytest.raises(SystemExit) as caught:
        main([*SAVED, "--out", str(out), "--overwrite"])
    assert caught.value.code == 130
    kept = {name: text for name, text in contents(out).items() if not name.startswith(f"{NEW}/")}
    assert kept == contents(a_run)


def test_a_full_disk_in_the_new_run_says_that_the_old_one_is_there(tmp_path):
    new = tmp_path / "run" / NEW
    new.mkdir(parents=True)
    (new / "metrics.jsonl").mkdir()  # cannot be opened for writing either
    with pytest.raises(UserError, match=f"start again; the old run is still in {tmp_path}/run"):
        append_rows(new / "metrics.jsonl", [{"step": 0}])


# --------------------------------------------------------------------------------- one writer alone


def test_a_second_writer_is_refused_and_the_first_goes_on(a_run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(a_run, out)
    with one_writer(str(out)):
        before = contents(a_run)
        for flags in ([*SAVED, "--out", out, "--overwrite"], ["--resume", out, "--steps", "6"]):
            told = error_of(capsys, *flags)
            assert f"{out} is in use: process {os.getpid()} writes there" in told
        assert {n: text for n, text in contents(out).items() if n != LOCK_FILE} == before
    assert not (out / LOCK_FILE).exists()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path):
    code = "import sys, lock, time\nwith lock.one_writer(sys.argv[1]):\n    print(flush=True)\n"
    child = subprocess.Popen(
        [sys.executable, "-c", code + "    time.sleep(600)", str(tmp_path / "run")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
    )
    child.stdout.readline()
    with pytest.raises(UserError, match=f"is in use: process {child.pid} writes"):
        with one_writer(str(tmp_path / "run")):
            pass
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert (tmp_path / "run" / LOCK_FILE).is_file()
    with one_writer(str(tmp_path / "run")):
        assert (tmp_path / "run" / LOCK_FILE).read_text() == f"process {os.getpid()}\n"


@pytest.mark.parametrize("is_link", [False, True])
def test_a_file_of_that_name_that_is_no_lock_stays(tmp_path, is_link):
    out, mine = tmp_path / "run", tmp_path / "mine"
    out.mkdir()
    mine.write_text("" if is_link else "pinned = 3\n", encoding="utf-8")
    before = mine.read_bytes()
    if is_link:  # in a folder that somebody else made, it may lead to any file
        (out / LOCK_FILE).symlink_to(mine)
    else:
        shutil.copy(mine, out / LOCK_FILE)
    for path in (mine, out / LOCK_FILE):
        with pytest.raises(UserError, match="no lock of a run"), one_writer(str(out)):
            pass
        assert path.read_bytes() == before


def test_a_folder_in_which_nothing_was_written_goes(tmp_path):
    (tmp_path / "mine").mkdir()
    for name, stays in [("deep/new", False), ("mine", True)]:
        with one_writer(str(tmp_path / name)):
            assert (tmp_path / name / LOCK_FILE).is_file()
        assert (tmp_path / name).exists() == stays


@pytest.mark.parametrize("out", ["", "  "])
def test_out_must_have_a_name(out, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert "--out is empty" in error_of(capsys, *SAVED, "--out", out)
    assert not list(tmp_path.iterdir())


# -------------------------------------------------------------- what a resumed run learns from


def write_data(path: Path, n: int) -> None:
    lines = []
    for i in range(n):
        words = f"{i * 37 % 101} sheep and {i * 53 % 89} goats in field {i}"
        lines.append(json.dumps({"prompt": f"count {i}:", "target": f" {words}."}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_a_run_is_not_resumed_on_other_data(tmp_path, capsys):
    """The built-in model's tokenizer is made from the data: made again, its ids mean something
    else. It comes from the checkpoint."""
    data, out = tmp_path / "data.jsonl", tmp_path / "run"
    write_data(data, 40)
    main([*SAVED, "--ppo-ratio", "0", "--data", str(data), "--out", str(out)])
    before, vocabulary = contents(out), load_tokenizer(str(out / "final")).get_vocab()
    write_data(data, 44)
    told = error_of(capsys, "--resume", out, "--steps", "6")
    assert "44 examples instead of 40" in told and "--accept-changes" in told
    assert contents(out) == before
    main(["--resume", str(out), "--steps", "6", "--accept-changes"])
    assert "44 examples instead of 40" in capsys.readouterr().out
    assert load_tokenizer(str(out / "final")).get_vocab() == vocabulary
    rows = [row for row in read_rows(out / "metrics.jsonl") if row["phase"] == "sft"]
    assert rows[4]["sft/loss"] < rows[3]["sft/loss"] + 0.5, "no jump onto scrambled ids"
    # What was accepted is what the next resume compares with.
    main(["--resume", str(out), "--steps", "7"])
    # As many examples, one of them changed; and another order of the same is no change of names.
    text = data.read_text(encoding="utf-8")
    data.write_text(text.replace("sheep", "lambs", 1), encoding="utf-8")
    assert "examples have changed" in error_of(capsys, "--resume", out, "--steps", "8")


def test_a_run_is_not_resumed_with_another_reward_or_base_model(tiny_folder, tmp_path, capsys):
    base, out, reward = tmp_path / "base", tmp_path / "run", tmp_path / "r.py"
    shutil.copytree(tiny_folder, base)
    text = "def f(prompts, completions, **columns):\n    return [0.5 for _ in completions]\n"
    reward.write_text(text, encoding="utf-8")
    flags = ["--model", base, "--reward", f"0.7*{reward}:f + 0.3*length", "--out", out]
    main([str(flag) for flag in [*SAVED, *flags]])
    reward.write_text(text.replace("0.5", "0.625"), encoding="utf-8")
    told = error_of(capsys, "--resume", out, "--steps", "6")
    assert f"--reward {reward} has changed" in told and "examples" not in told
    reward.write_text(text, encoding="utf-8")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config["rms_norm_eps"] = 0.5
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    assert f"--model {base} has changed" in error_of(capsys, "--resume", out, "--steps", "6")
    shutil.rmtree(base)  # the model comes from the checkpoint
    assert f"--model {base} is not there" in error_of(capsys, "--resume", out, "--steps", "6")
    main(["--resume", str(out), "--steps", "5", "--accept-changes"])
    said = capsys.readouterr().out
    assert f"this run executes the code of --reward {reward}" in said
    assert said.index("executes the code") < said.index("step 5")


def test_a_reward_asks_the_starting_model_after_a_resume_too(tmp_path):
    """Not the model of the checkpoint, which PPO may have taught what the reward likes."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    flags = ["--steps", "2", "--ppo-ratio", "1", "--save-every", "1", "--reward", "perplexity"]
    main([*FAST, *flags, "--out", str(whole)])
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "final")
    main(["--resume", str(cut)])
    for name in ("model.safetensors", "value_head.safetensors"):
        assert (cut / "final" / name).read_bytes() == (whole / "final" / name).read_bytes()
    assert (cut / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()


REWARD = "def f(prompts, completions, **columns):\n    return [0.5 for _ in completions]\n"


@pytest.mark.parametrize(
    "file, expression, code",
    [
        ("my dir/r.py", "0.25*'my dir/r.py:f' + length", ["my dir/r.py"]),
        ("my dir/r.py", "my dir/r.py:f", ["my dir/r.py"]),
        ("a+b.py", '"a+b.py:f"', ["a+b.py"]),
        ("r.py", "~/r.py:f", ["~/r.py"]),
        ("my dir/words.txt", "sentiment(lexicon='my dir/words.txt')", []),
    ],
)
def test_the_files_of_a_reward_are_found_by_its_syntax(
    tmp_path, monkeypatch, file, expression, code
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for folder in ("my dir", "length", "0.25"):  # the last two only look like a part
        (tmp_path / folder).mkdir()
    (tmp_path / file).write_text(REWARD, encoding="utf-8")
    args = parse_args(["--reward", expression])
    found = fingerprint.used_paths(args)
    assert [path.resolve() for path in found.values()] == [tmp_path / file]
    assert fingerprint.named_in(expression)[0] == code
    assert fingerprint.used_paths(parse_args(["--reward", f"judge('{'x y' * 999}')"])) == {}


def test_patterns_name_files_too(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c.txt"):
        (tmp_path / name).write_text("x", encoding="utf-8")
    args = parse_args(["--data", f"{tmp_path}/*.jsonl", "--mixture-data", f"{tmp_path}/?.txt"])
    assert [path.name for path in fingerprint.used_paths(args).values()] == [
        "a.jsonl", "b.jsonl", "c.txt",
    ]  # fmt: skip


def test_a_reward_may_be_mended_until_a_checkpoint_keeps_it(tmp_path, capsys):
    """The mended one raises too, in the evaluation that is owed, before any step."""
    out, reward = tmp_path / "run", tmp_path / "r.py"
    text = (
        "calls = []\n\n\ndef f(prompts, completions, **columns):\n    calls.append(1)\n"
        "    assert len(calls) < 4, 'late'\n    return [0.5 for _ in completions]\n"
    )
    flags = ["--steps", "2", "--ppo-ratio", "1", "--eval-every", "1", "--reward", f"{reward}:f"]
    for allowed in (4, 2, 99):
        reward.write_text(text.replace("< 4", f"< {allowed}"), encoding="utf-8")
        if allowed == 4:
            assert "saved as of step 1" in error_of(capsys, *FAST, *flags, "--out", out)
        elif allowed == 2:
            assert "late" in error_of(capsys, "--resume", out)
    main(["--resume", str(out)])
    assert "ended_by_a_failure" not in json.loads((out / "config.json").read_text("utf-8"))


def test_large_files_are_told_apart_by_their_size_and_their_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "ENDS", 8)
    seen = set()
    for text in ("abcdefgh-12345-ijklmnop", "abcdefgh-1234-ijklmnop", "abcdefgh-12345-ijklmnoq"):
        (tmp_path / "model.bin").write_text(text, encoding="utf-8")
        seen.add(fingerprint.of_files(tmp_path))
    assert len(seen) == 3
    (tmp_path / "notes.md").write_text("no file of a model", encoding="utf-8")
    assert fingerprint.of_files(tmp_path) in seen


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("steps", "many", "argument --steps: expected a whole number at least 1, found 'many'"),
        ("steps", "12", "steps is '12', which --steps cannot be"),
        ("steps", True, "argument --steps: expected one argument"),
        ("steps", None, "steps is None, which --steps cannot be"),
        ("batch_size", [4, 8], "argument --batch-size"),
        ("algorithm", "ppo2", "argument --algorithm: invalid choice: 'ppo2'"),
        ("schedule", 7, "argument --schedule: invalid choice: '7'"),
        ("kl_coef", -0.25, "argument --kl-coef"),
        ("whiten_rewards", "yes", "argument --whiten-rewards"),
        ("ppo_ratio", [0.25, 0.5, 0.75], "argument --ppo-ratio"),
        ("data", {"a": 1}, "data is {'a': 1}"),
        ("keep", 10**400, "argument --keep: expected a whole number at least 1"),
    ],
)
def test_an_edited_config_is_one_line(a_run, tmp_path, name, value, told):
    config = json.loads((a_run / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "config.json").write_text(json.dumps({**config, name: value}), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        parse_args(["--resume", str(tmp_path)], ALGORITHMS, SCHEDULES)
    assert str(caught.value).startswith(f"{tmp_path / 'config.json'}: ")
    assert told in str(caught.value)


def test_other_unreadable_files_are_one_line(a_run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(a_run, out)
    state = out / "final" / "trainer_state.pt"
    state.write_bytes(state.read_bytes().replace(b"little", b"litt\xd0e"))
    assert "trainer_state.pt is damaged" in error_of(capsys, "--resume", out, "--steps", "6")
    (out / "config.json").write_text("[" * 100_000, encoding="utf-8")
    assert "nothing to resume there" in error_of(capsys, "--resume", out, "--steps", "6")
    assert "--accept-changes is for --resume" in error_of(capsys, "--accept-changes")


def test_every_flag_goes_through_config_json_unchanged(tmp_path):
    words = (
        "--model m --data a.jsonl b.jsonl --prompts p.txt --ppo-ratio 0.25:0.75 --lr 3.7e-05 "
        "--ref-model a=x:0.5 --ref-model b=y --reward 0.3*length --kl-target 4.5 --turn-rewards "
        "--turns 3 --keep-best=-eval/nll --max-length 77 --whiten-rewards --seed 5"
    )
    args = vars(parse_args([*words.split(), "--template-args", '{"k": [1, true]}']))
    (tmp_path / "config.json").write_text(json.dumps(args), encoding="utf-8")
    resumed = vars(parse_args(["--resume", str(tmp_path)]))
    assert resumed == {**args, "resume": str(tmp_path), "out": str(tmp_path)}


def test_a_key_that_config_json_lacks_is_named(a_run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(a_run, out)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    del config["kl_horizon"]
    (out / "config.json").write_text(json.dumps(config), encoding="utf-8")
    main(["--resume", str(out), "--steps", "5"])
    assert "config.json lacks kl_horizon: the defaults are taken" in capsys.readouterr().out


@pytest.mark.parametrize("key", ["counters", "rng", "stateful", "reference", "order"])
def test_a_state_of_another_version_is_one_line(a_run, tmp_path, key, capsys):
    out = tmp_path / "run"
    shutil.copytree(a_run, out)
    for folder in [*out.glob("checkpoint-*"), out / "final"]:
        state = torch.load(folder / "trainer_state.pt", weights_only=True)
        del state[key]
        torch.save(state, folder / "trainer_state.pt")
    told = error_of(capsys, "--resume", out, "--steps", "6")
    assert "trainer_state.pt" in told and "Traceback" not in told


def test_a_state_without_fingerprints_is_resumed_with_a_note(a_run, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(a_run, out)
    folder = newest_checkpoint(out)
    state = torch.load(folder / "trainer_state.pt", weights_only=True)
    assert state.pop("fingerprint")["examples"][0] == 60
    torch.save(state, folder / "trainer_state.pt")
    main(["--resume", str(out), "--steps", "5"])
    assert "whether its data changed is not known" in capsys.readouterr().out


def test_a_run_that_died_before_the_row_of_an_evaluation_measures_again(a_run, tmp_path):
    """The samples were written, the row was not."""
    out = tmp_path / "run"
    shutil.copytree(a_run, out)
    rows = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    assert json.loads(rows[-1])["phase"] == "eval"
    (out / "metrics.jsonl").write_text("".join(rows[:-1]), encoding="utf-8")
    main(["--resume", str(out)])
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (out / name).read_bytes() == (a_run / name).read_bytes()
