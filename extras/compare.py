"""Runs of several seeds, by their means; and what a decoder changes: runs that differ in it and in their seed alone,
side by side."""

import warnings

import numpy as np
from scipy import stats

from caps import MODELS, RECIPE, set_title

DIGITS = {"R² of the angle": 3}  # after the point; of percentages 2
WEIGHTLESS = {"lr", "lr_scale", "warmup", "step_size", "gamma"}  # options that cost no time


def setting(run, *but):
    """What runs of several seeds have in common, but for some options."""
    data = run.facts["traits"]["digest"] or run.facts["dataset"]
    keys = [key for key in (*RECIPE, "epochs", "world_size", "layers") if key not in ("seed", "dataset", *but)]
    return repr([data, *(run.facts.get(key) for key in keys)])


def groups(runs):
    """Lists of runs that differ in their seed alone, the lowest first; another run of a seed begins a list of its own."""
    found = {}
    for run in runs:
        alike = found.setdefault(setting(run), [])
        group = next((group for group in alike if run.facts["seed"] not in [other.facts["seed"] for other in group]), [])
        if not group:
            alike.append(group)
        group.append(run)
    return [sorted(group, key=lambda run: run.facts["seed"]) for alike in found.values() for group in alike]


def quietest(group, runs):
    """The fastest run of a group's setting on its CPU or GPU, with any number of epochs and any learning rate: whatever else
    a machine does makes runs slower."""
    def way(run):
        return setting(run, "epochs", *WEIGHTLESS), run.facts.get("device", "").split(",")[0]
    alike = [*group, *(run for run in runs if run.rows and way(run) == way(group[0]))]
    return min(alike, key=lambda run: run.facts.get("seconds_per_epoch", float("inf")))


def pairs(runs):
    """[(runs without, runs with a decoder of one weight)] of those runs that have both; of a seed the first."""
    found = {}
    for run in runs:
        found.setdefault(setting(run, "decoder"), {}).setdefault(run.facts["decoder"], {}).setdefault(run.facts["seed"], run)
    return [(list(kinds[0].values()), list(kinds[weight].values()))
            for kinds in found.values() if 0 in kinds for weight in sorted(kinds) if weight]


def knowledge(accuracy, r2, robustness):
    """What is compared, from the test accuracy, R² of the angle by class or None, and robustness's results: their means
    over all levels of a distortion."""
    angle = {"R² of the angle": np.nanmean(r2)} if r2 is not None else {}
    distorted = {f"under {kind.split(' (')[0]} (%)": 100 * np.mean(levels[1:]) for kind, levels in robustness.items()}
    return {"test accuracy (%)": 100 * accuracy} | angle | distorted


def title(run):
    several = [f"{run.facts['world_size']} processes"] * (run.facts["world_size"] > 1)
    others = [text for text in run.departures if text.split()[0] not in ("decoder", "dataset")]
    epochs = f"{run.facts['epochs']} epoch{'s' * (run.facts['epochs'] > 1)}"
    return ", ".join([MODELS[run.facts["model"]].__name__, set_title(run.facts["dataset"]), epochs, *several, *others])


def common(pair):
    return [what for what in pair[0][0].knowledge if all(what in run.knowledge for runs in pair for run in runs)]


def rows(pair):
    """Means and standard deviations over seeds, without and with a decoder."""
    return [{"runs": title(runs[0]), "decoder's weight": f"{runs[0].facts['decoder']:g}" if runs[0].facts["decoder"] else None,
             "seeds": len(runs)} | {what: spread([run.knowledge[what] for run in runs], DIGITS.get(what, 2)) for what in common(pair)}
            for runs in pair]


def spread(values, digits=2):
    """Mean ± standard deviation over seeds."""
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def verdict(pair):
    """A sentence on what differs: by Welch's t-test at 5 % over all measures, after Holm."""
    name = title(pair[0][0])
    if min(map(len, pair)) < 2:
        return f"{name}: one seed with or without a decoder shows nothing, two of each may."
    values = {what: [[run.knowledge[what] for run in runs] for runs in pair] for what in common(pair)}
    chance, least = {what: p_value(*both) for what, both in values.items()}, 0.0
    differing, others = [], []
    for rank, what in enumerate(sorted(chance, key=chance.get)):
        least = min(1.0, max(least, chance[what] * (len(chance) - rank)))
        change, unit = np.mean(values[what][1]) - np.mean(values[what][0]), " points" * what.endswith(" (%)")
        said = (f"{what.removesuffix(' (%)')} {change:+.{DIGITS.get(what, 2)}f}{unit} (p = {chance[what]:.2g}, corrected "
                f"{least:.2g})")
        (differing if least < 0.05 else others).append(said)
    if not differing:
        return f"{name}: no difference is shown: {', '.join(others)}."
    return f"{name}: with a decoder {', '.join(differing)}" + f"; not shown to differ: {', '.join(others)}" * bool(others) + "."


def p_value(a, b):
    """Welch's; 1 where neither side varies, since that is chance: nothing tells how much they might."""
    if np.ptp(a) == np.ptp(b) == 0:
        return 1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scipy's, of values that hardly differ
        return float(stats.ttest_ind(a, b, equal_var=False).pvalue)
