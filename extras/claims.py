"""What the study claims, and how finished runs judge it. Runs are those that report.read_run reads.

A judge returns whether a claim holds, None where that is not measured, and what was measured.
"""

import numpy as np

from caps import MODELS


def claims(runs, fits):
    """Rows of the claims table; `fits` is {title of a run: {kind of features: fit_angles' result}}."""
    every, runs = runs, [run for run in runs if not run.facts["decoder"]]  # the study's networks have none
    judges = {(model, several): reference(runs, model, several) for model in MODELS for several in (False, True)}
    alex, res = pair = [judges[model, False] for model in MODELS]
    several, in_time = judges["alexcaps", True], "1.5 times or more, same device and amp"
    full, none = [run for run in runs if run.full], "no finished run on full MNIST"
    fewest_parameters = {"alexcaps": 10e6, "rescaps": 1e6}
    r2 = {title: [np.nanmean(r2) for r2, _ in fit.values()] for title, fit in fits.items()}
    table = [(f"{MODELS[model].__name__}: {100 * value:.2f} % with {how}, {epochs} epochs", "as high by then",
              judge_accuracy, judges[model, how != "1 process"], epochs, value)
             for model, how, epochs, value in (
                 ("alexcaps", "1 process", 10, 0.9806), ("alexcaps", "several processes", 20, 0.9628),
                 ("rescaps", "1 process", 20, 0.9870), ("rescaps", "several processes", 10, 0.9786))]
    table += [
        ("ResCapsNet ends higher", "by two standard errors, not after longer training", judge_higher, alex, res),
        ("AlexCapsNet reaches 90 % two to three epochs earlier", "by 2 epochs or more", judge_earlier, alex, res),
        ("ROC nearly perfect for both", "macro AUC of each at least 0.99", judge_both,
         lambda run: run.facts["macro_auc"] >= 0.99, lambda run: f"{run.facts['macro_auc']:.5f}",
         [run for run in pair if not isinstance(run, str)]),
        ("AlexCapsNet has tens of millions of parameters, ResCapsNet a few million",
         "10 to 100 and 1 to 10 million; the described networks have what is measured here", judge_both,
         lambda run: 1 <= run.facts["parameters"] / fewest_parameters[run.facts["model"]] < 10,
         lambda run: f"{run.facts['parameters'] / 1e6:.2f} million",
         [r for r in runs if "parameters" in r.facts and r.facts["traits"]["framing"] == "mnist" and r.study_sized]),
        ("An AlexCapsNet epoch takes twice a ResCapsNet epoch", in_time, judge_time, alex, res),
        ("Several processes shorten AlexCapsNet's time significantly", in_time, judge_time, alex, several),
        ("The loss falls smoothly", "training loss, in 9 of 10 epochs, no rise above 10 %", judge_smooth, full or none),
        ("No instability with 3 iterations", "losses finite, no epoch loses more than 2 points of test accuracy",
         judge_stable, [run for run in full if run.facts["iterations"] == 3] or none),
        *((f"Capsules preserve digit orientation{also}", "R² of the angle at least 0.5 and above the length's, both",
           judge_both, lambda run: 0.5 <= r2[run.title][0] > r2[run.title][1],
           lambda run: "{:.2f}, from the length {:.2f}".format(*r2[run.title]),
           sorted([run for run in every if run.full and run.title in r2 and (run.facts["decoder"] > 0) == decoder],
                  key=nearness))
          for decoder, also in [(False, "")] + [(True, ", the same with a decoder")] * (len(every) > len(runs)))]
    words, rows = {True: "holds", False: "**does not hold**", None: "not measured"}, []
    for says, criterion, judge, *needs in table:  # a need that is a text says what is lacking
        lacking = [need for need in needs if isinstance(need, str)]
        holds, said = (None, "; ".join(lacking)) if lacking else judge(*needs)
        rows.append({"the study": says, "criterion here": criterion, "measured here": said, "verdict": words[holds]})
    return rows


def nearness(run):
    """Sorts the runs of a model by their likeness to the study's; accuracy has no say."""
    return run.facts["model"], run.full, run.facts.get("world_size") == 1, min(len(run.rows), 20), -len(run.departures)


def reference(runs, model, several):
    """The run on full MNIST, with one or several processes, that claims are judged by; without one, that in words."""
    none = f"no finished run of {MODELS[model].__name__} with {'several processes' if several else '1 process'}"
    found = [r for r in runs if r.full and r.facts["model"] == model and (r.facts["world_size"] > 1) == several]
    return max(found, key=nearness, default=f"{none} on full MNIST")


def judge_accuracy(run, epochs, value):
    rows = run.rows[:epochs]
    reached = rows[-1]["test_accuracy"]
    said = f"{100 * reached:.2f} % after {len(rows)} of {epochs} epochs ({run.title})"
    return reached >= value or (None if len(rows) < epochs else False), said


def judge_both(holds, say, runs):
    """A claim on both models: a run of each can refute it, only both can prove it."""
    found = {run.facts["model"]: run for run in runs}
    said = [f"{MODELS[m].__name__} {say(found[m])}" if m in found else f"no {MODELS[m].__name__}" for m in MODELS]
    return all(map(holds, found.values())) and (len(found) == len(MODELS) or None), ", ".join(said)


def judge_higher(alex, res):
    (a, m), (r, n) = ((run.rows[-1]["test_accuracy"], len(run.rows)) for run in (alex, res))
    unfair = n > m if r > a else n < m
    error = 100 * np.sqrt((a * (1 - a) + r * (1 - r)) / np.sum(alex.facts["confusion"]))
    close = 100 * abs(r - a) < 2 * error
    said = f"{100 * r:.2f} % after {n} epochs against {100 * a:.2f} % after {m}; one seed each, standard error of the "
    return None if unfair or close else r > a, said + f"difference {error:.2f} points"


def judge_earlier(*runs):
    first = [next((row["epoch"] for row in run.rows if row["test_accuracy"] >= 0.9), None) for run in runs]
    said = [f"epoch {e}" if e else f"not within {len(run.rows)} epochs" for e, run in zip(first, runs)]
    low = [e or len(run.rows) + 1 for e, run in zip(first, runs)]
    high = [e or float("inf") for e in first]  # low and high bound the epoch of a run that ended before 90 %
    return True if low[1] - high[0] >= 2 else False if high[1] - low[0] < 2 else None, " against ".join(said)


def judge_time(slow, fast):
    ratio, work = slow.facts["seconds_per_epoch"] / fast.facts["seconds_per_epoch"], slow.size[1] / fast.size[1]
    same = all(slow.facts[key] == fast.facts[key] for key in ("device", "amp"))
    said = ["{seconds_per_epoch:.0f} s ({device}, amp {amp})".format(**run.facts) for run in (slow, fast)]
    said = f"{ratio:.2f} times: {' against '.join(said)}; {work:.3f} times the multiply-adds"
    return ratio >= 1.5 if same else None, said + ("" if same else "; not the same device and amp")


def judge_smooth(runs):
    losses = [np.array([row["train_loss"] for row in run.rows]) for run in runs]
    change = np.concatenate([100 * np.diff(loss) / loss[:-1] for loss in losses])
    fell, rise = (change < 0).sum(), change.max(initial=0)
    return (bool(fell >= 0.9 * len(change) and rise <= 10) if len(change) else None,
            f"fell in {fell} of {len(change)} epochs after the first, largest rise {rise:.1f} %; {len(runs)} run(s)")


def judge_stable(runs):
    finite = all(np.isfinite([row["train_loss"], row["test_loss"]]).all() for run in runs for row in run.rows)
    fall = max(-100 * np.diff([row["test_accuracy"] for row in run.rows]).min(initial=0) for run in runs)
    said = "all losses finite" if finite else "a loss that is not finite"
    return bool(finite and fall <= 2), f"{said}, largest fall {fall:.2f} points; {len(runs)} run(s)"
