"""What a decoder changes: runs that differ in their decoder and their seed alone, side by side by means over seeds."""

import warnings

import numpy as np
from scipy import stats

from caps import MODELS, RECIPE, set_title
from caps.extras.probes import DISTORTIONS

DIGITS = {"R² of the angle": 3}  # after the point; of percentages 2


def setting(run, *but):
    """What makes runs of several seeds the same, but for some options."""
    return repr([run.facts[key] for key in RECIPE if key not in ("seed", *but)] + [len(run.rows), run.facts.get("world_size")])


def of_one_seed(runs):
    """Of runs that differ in their seed alone, the one of the least."""
    return list({setting(run): run for run in sorted(runs, key=lambda run: -run.facts["seed"])}.values())[::-1]


def pairs(runs):
    """[(runs without, runs with a decoder)] of those runs that have both; of a seed one each."""
    found = {}
    for run in runs:
        kinds = found.setdefault(setting(run, "decoder"), ({}, {}))
        kinds[run.facts["decoder"] > 0].setdefault(run.facts["seed"], run)
    return [tuple(list(kind.values()) for kind in kinds) for kinds in found.values() if all(kinds)]


def knowledge(accuracy, r2, distorted):
    """What is compared, from the test accuracy, R² of the angle by class, and robustness's results: their means over all
    levels of a distortion."""
    rows = [("test accuracy (%)", 100 * accuracy)] + [("R² of the angle", np.nanmean(r2))] * (r2 is not None)
    return dict(rows) | {f"{kind} (%)": 100 * np.mean(distorted[name][1:])
                         for kind, name in zip(("rotated", "shifted", "with noise"), DISTORTIONS)}


def title(run):
    several = [f"{run.facts['world_size']} processes"] * ((run.facts.get("world_size") or 1) > 1)
    others = [text for text in run.departures if text.split()[0] not in ("seed", "decoder")]
    epochs = f"{len(run.rows)} epoch{'s' * (len(run.rows) > 1)}"
    return ", ".join([MODELS[run.facts["model"]].__name__, set_title(run.facts["dataset"]), epochs, *several, *others])


def rows(pair):
    """Means and standard deviations over seeds, without and with a decoder."""
    return [{"runs": title(pair[0][0]), "decoder": name, "seeds": len(runs)} | {
        what: spread(what, [run.knowledge[what] for run in runs]) for what in common(pair)}
        for name, runs in zip(("without", "with"), pair)]


def common(pair):
    return [what for what in pair[0][0].knowledge if all(what in run.knowledge for runs in pair for run in runs)]


def spread(what, values):
    digits = DIGITS.get(what, 2)
    return f"{np.mean(values):.{digits}f}" + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def verdict(pair):
    """A sentence on what differs, by Welch's t-test at 5 %."""
    if min(map(len, pair)) < 2:
        return f"{title(pair[0][0])}: one seed with or without a decoder shows nothing."
    differing, others = [], []
    for what in common(pair):
        without, having = ([run.knowledge[what] for run in runs] for runs in pair)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy's, of values that hardly differ
            p = stats.ttest_ind(without, having, equal_var=False).pvalue
        change, name = np.mean(having) - np.mean(without), what.removesuffix(" (%)")
        points = " points" * (name != what)
        (differing if p < 0.05 else others).append(f"{name} {change:+.{DIGITS.get(what, 2)}f}{points} (p = {p:.2g})")
    said = f"with a decoder {', '.join(differing)}" if differing else "no difference is shown"
    return f"{title(pair[0][0])}: {said}" + f"; not shown to differ: {', '.join(others)}" * bool(others) + "."
