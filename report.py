"""What a comparison leaves behind: compare.json, compare.md, pareto.png and, with --tax, razor.png.

Left out on purpose: the runs themselves, which lie in their folders.

    python compare.py --out compare            # writes them into the folder compare
"""

import json
from pathlib import Path

from arms import exact
from budgets import add_equal_budgets, metric_of
from figures import draw_pareto, draw_razor
from runs import read_config
from tables import at_equal_reward, markdown

CAVEAT = (
    "A value at an equal budget is read from the curve of each run, linearly between evaluations; "
    "before the end of a run its learning rate has not decayed yet."
)


def rates_of(job, args) -> dict[str, float]:
    """The rates of an arm, by the config.json of a run of its first seed."""
    config = read_config(job._replace(seed=0 if args.untuned else 1).folder(Path(args.out)))
    return {name: config[name] for name in args.rates[job.arm] if name in config}


def describe(args, results: dict, chosen: dict, tuned: list) -> str:
    """The lines below the table: steps, seeds, rates."""
    said = []
    for arm, rates in chosen.items():
        is_sft = not any(run["rollouts"] for run in results[arm])
        named = {name: value for name, value in rates.items() if name == "lr" or not is_sft}
        if named.get("rl_lr") == named.get("lr"):
            named.pop("rl_lr", None)
        words = [f"{name.replace('_', '-')} {exact(value)}" for name, value in named.items()]
        if args.arms[arm].steps != args.steps:
            words.insert(0, f"{args.arms[arm].steps} steps")
        said.append(f"{arm}: {', '.join(words)}")
    how = f"Tuned on seed 0 by {args.select}" if tuned else "Not tuned"
    return (
        f"{args.steps} steps, {args.seeds} seeds, mean and 95 % interval. {how}: "
        f"{'; '.join(said)}.\n{CAVEAT}\n{at_equal_reward(results)}"
    )


def named(source: str | list[str]) -> str:
    """A source of data in a title: a file without its folder, a hub dataset with what is of it."""
    words = [source] if isinstance(source, str) else source
    return " ".join([Path(words[0]).name if Path(words[0]).exists() else words[0], *words[1:]])


def write_report(args, argv: list[str], tuned: list, best: dict, finished: list) -> dict:
    """Write compare.json, compare.md and the figures, print the table. Returns the JSON."""
    out = Path(args.out)
    results = {arm: [summary for job, summary in finished if job.arm == arm] for arm in best}
    first = finished[0][1]
    metric = metric_of(first, args.metric, args.select)
    amounts = add_equal_budgets(results, metric)
    tuning = []
    for job, summary in tuned:
        metrics = {name: value for name, value in summary.items() if name.startswith("eval/")}
        tuning.append({"arm": job.arm, "lr": job.lr, "kl_coef": job.kl_coef, **metrics})
    report = {
        "command": ["compare.py", *argv],
        "flags": {name: arm.words for name, arm in args.arms.items()},
        "chosen": {arm: rates_of(job, args) for arm, job in best.items()},
        "metric": metric,
        "equal budgets": amounts,
        "tuning": tuning,
        "runs": results,
    }
    (out / "compare.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    text = f"{markdown(results, metric, amounts)}\n\n"
    text += describe(args, results, report["chosen"], tuned)
    (out / "compare.md").write_text(text, encoding="utf-8")
    print(text)
    config = read_config(finished[0][0].folder(out))
    data = named(config.get("data") or "reviews")
    model = Path(config.get("model", "tiny"))
    model = f"{model.parent.name}/final" if model.name == "final" else model.name
    title = f"{data}, model {model}: {args.steps} steps, {args.seeds} seeds (mean, 95 % interval)"
    draw_pareto(results, tuned, metric, title, out / "pareto.png")
    if any("KL from the start" in run for runs in results.values() for run in runs):
        title = f"{title.partition(' (')[0]}; elsewhere: {named(args.tax)}"
        draw_razor(results, title, out / "razor.png")
    return report
