"""What the study claims, and how finished runs judge it. Runs are those that report.read_run reads; a group of them
differs in the seed alone.

A judge returns whether a claim holds, None where that is not measured, and what was measured.
"""

import itertools

import numpy as np

from caps import MODELS
from caps.extras.compare import WEIGHTLESS, groups, p_value, spread

# What the study's published notebooks and scripts do otherwise than its text: (network, with several processes), its
# accuracy, and the options that are others.
CODE = [
    ("AlexCapsNet, 1 process: 128 images a step, no decay, 10 epochs; the text has 32, a decay and 20",
     ("alexcaps", False), 0.9806, {"batch_size": 128, "gamma": 1, "epochs": 10}),
    ("ResCapsNet, 1 process: neither rotation nor decay", ("rescaps", False), 0.9870, {"rotate": 0, "gamma": 1}),
    ("AlexCapsNet, several processes: 128 images each, times 4 accumulated, no decay", ("alexcaps", True), 0.9628,
     {"batch_size": 128, "accumulate": 4, "gamma": 1, "lr_scale": "none", "warmup": 0}),
]


def claims(runs, fits):
    """Rows of the claims table; `fits` is {title of a run: {kind of features: fit_angles' result}}."""
    every, runs = runs, [run for run in runs if not run.facts["decoder"]]  # the study's networks have none
    judges = {kind: reference(runs, *kind) for kind in itertools.product(MODELS, (False, True), (10, 20))}
    alex, res = pair = [judges[model, False, 20] for model in MODELS]
    in_time = "1.5 times or more, same device and amp"
    studied = [run for (*_, epochs), group in judges.items() if epochs == 20 and not isinstance(group, str) for run in group]
    none = "no finished run on full MNIST"
    fewest_parameters = {"alexcaps": 10e6, "rescaps": 1e6}
    r2 = {title: [np.nanmean(r2) for r2, _ in fit.values()][:2] for title, fit in fits.items()}  # the capsule's, its length's
    table = [(f"{MODELS[model].__name__}: {100 * value:.2f} % with {how}, {epochs} epochs",
              "as high by then, of several seeds their mean", judge_accuracy, judges[model, how != "1 process", epochs], epochs, value)
             for model, how, epochs, value in (
                 ("alexcaps", "1 process", 10, 0.9806), ("alexcaps", "several processes", 20, 0.9628),
                 ("rescaps", "1 process", 20, 0.9870), ("rescaps", "several processes", 10, 0.9786))]
    table += [
        ("ResCapsNet ends higher", "not after longer training; by Welch's t-test over seeds at 5 %, where that cannot be by two "
         "standard errors", judge_higher, alex, res),
        ("AlexCapsNet reaches 90 % two to three epochs earlier", "by 2 epochs or more", judge_earlier, alex, res),
        ("ROC nearly perfect for both", "macro AUC of each at least 0.99", judge_both,
         lambda group: mean(of(group, "macro_auc")) >= 0.99, lambda group: several_of(of(group, "macro_auc"), 5),
         [group for group in pair if not isinstance(group, str) and all("macro_auc" in run.facts for run in group)]),
        ("AlexCapsNet has tens of millions of parameters, ResCapsNet a few million",
         "10 to 100 and 1 to 10 million; the described networks have what is measured here", judge_both,
         lambda group: 1 <= group[0].facts["parameters"] / fewest_parameters[group[0].facts["model"]] < 10,
         lambda group: f"{group[0].facts['parameters'] / 1e6:.2f} million",
         [[r] for r in runs if "parameters" in r.facts and r.facts["traits"]["framing"] == "mnist" and r.study_sized]),
        ("An AlexCapsNet epoch takes twice a ResCapsNet epoch", in_time, judge_time,
         *timed(runs, [("alexcaps", False), ("rescaps", False)])),
        ("Several processes shorten AlexCapsNet's time significantly", in_time + ", which several CPU processes share",
         judge_processes, *timed(runs, [("alexcaps", False), ("alexcaps", True)])),
        ("The loss falls smoothly", "training loss, in 9 of 10 epochs, no rise above 10 %", judge_smooth, studied or none),
        ("No instability with 3 iterations", "losses finite, no epoch loses more than 2 points of test accuracy",
         judge_stable, [run for run in studied if run.facts["iterations"] == 3] or none),
        *((f"Capsules preserve digit orientation{also}", "R² of the angle at least 0.5 and above the length's, both",
           judge_both, lambda group: 0.5 <= mean([r2[run.title][0] for run in group]) > mean([r2[run.title][1] for run in group]),
           lambda group: "{}, from the length {}".format(*map(several_of, zip(*(r2[run.title] for run in group))))
           + f" ({', '.join(group[0].changes)})" * bool(group[0].changes),
           groups(run for run in every if run.full and run.title in r2 and (run.facts["decoder"] > 0) == decoder))
          for decoder, also in [(False, "")] + [(True, ", the same with a decoder")] * (len(every) > len(runs)))]
    words, rows = {True: "holds", False: "**does not hold**", None: "not measured"}, []
    for says, criterion, judge, *needs in table:  # a need that is a text says what is lacking
        lacking = [need for need in needs if isinstance(need, str)]
        holds, said = (None, "; ".join(lacking)) if lacking else judge(*needs)
        rows.append({"the study": says, "criterion here": criterion, "measured here": said, "verdict": words[holds]})
    return rows


def as_coded(runs):
    """Rows on what the study's code does otherwise than its text: both as measured here."""
    full, rows = [run for run in runs if run.full and not run.facts["decoder"]], []
    as_text = [run for run in full if not any(is_of(run, *kind) and is_coded(run, recipe) for _, kind, _, recipe in CODE)]
    for says, kind, value, recipe in CODE:
        both = reference(as_text, *kind), reference([run for run in full if is_coded(run, recipe)], *kind)
        cells = ["no finished run" if isinstance(group, str) else percent(reached(group)) + " ({})".format(
            ", ".join([f"{len(group[0].rows)} epochs", *group[0].departures])) for group in both]
        rows.append({"the study's code": says, "its accuracy": percent([value]), "here, nearest to its text": cells[0],
                     "here, as its code": cells[1]})
    return rows


def is_coded(run, recipe):
    """Whether a run has the options `recipe`, and else none but the study's and such as several processes need."""
    free = {"amp", *recipe, *(("accumulate", "lr_scale", "warmup") if run.facts["world_size"] > 1 else ())}
    return all(run.facts[key] == value for key, value in recipe.items()) and all(
        text.split()[0].replace("-", "_") in free for text in run.departures)


def nearness(run, epochs=20):
    """Sorts the runs of a model by their likeness to the study's of so many epochs; accuracy has no say."""
    return (run.facts["model"], run.full, run.facts.get("world_size") == 1, min(len(run.rows), epochs), -len(run.departures),
            -run.facts["seed"])


def is_of(run, model, several):
    return run.facts["model"] == model and (run.facts["world_size"] > 1) == several


def reference(runs, model, several, epochs=20):
    """The group of runs on full MNIST, with one or several processes, that claims on so many epochs are judged by; where
    there is none, that in words."""
    found = groups(run for run in runs if run.full and is_of(run, model, several))
    return nearest(found, epochs) if found else lacking(model, several)


def nearest(found, epochs=20):
    """Of groups that nearest to the study's; of equal ones that with the most seeds."""
    return max(found, key=lambda group: (nearness(group[0], epochs)[:-1], len(group)))


def lacking(model, several):
    return f"no finished run of {MODELS[model].__name__} with {'several processes' if several else '1 process'} on full MNIST"


def timed(runs, kinds):
    """Two runs on full MNIST, each of a (model, several processes): with any number of epochs the fastest of those nearest
    to the study's, of one device and amp, else of one amp, else of any; of several such two the fastest. In words what
    lacks."""
    def seconds(*runs):
        return sum(run.facts["seconds_per_epoch"] for run in runs)

    def burdens(run):
        return len({text.split()[0].replace("-", "_") for text in run.departures} - WEIGHTLESS)

    def two(alike):
        return [min((run for run in alike if is_of(run, *kind)), key=lambda run: (burdens(run), seconds(run)),
                    default=lacking(*kind)) for kind in kinds]
    full = [run for run in runs if run.full]
    for keys in (("device", "amp"), ("amp",)):
        ways = {}
        for run in full:
            ways.setdefault(tuple(run.facts[key] for key in keys), []).append(run)
        pairs = [pair for pair in map(two, ways.values()) if not any(isinstance(run, str) for run in pair)]
        if pairs:
            return min(pairs, key=lambda pair: seconds(*pair))
    return two(full)


def mean(values):
    """Without the last digits, which decide at a bound."""
    return round(float(np.mean(values)), 9)


def reached(group):
    return [run.rows[-1]["test_accuracy"] for run in group]


def of(group, fact):
    return [run.facts[fact] for run in group]


def several_of(values, digits=2, unit=""):
    return spread(values, digits) + unit + f", n = {len(values)}" * (len(values) > 1)


def percent(values):
    return several_of([100 * value for value in values], unit=" %")


def judge_accuracy(group, epochs, value):
    count = len(group[0].rows[:epochs])
    by_then = [run.rows[count - 1]["test_accuracy"] for run in group]
    said = f"{percent(by_then)} after {count} of {epochs} epochs"
    said += f" ({', '.join(group[0].departures)})" * bool(group[0].departures)
    return mean(by_then) >= value or (None if count < epochs else False), said


def judge_both(holds, say, groups):
    """A claim on both models: a group of each can refute it, only both can prove it."""
    found = {group[0].facts["model"]: group for group in groups}
    said = [f"{net.__name__} {say(found[m])}" if m in found else f"no {net.__name__} that counts" for m, net in MODELS.items()]
    return all(map(holds, found.values())) and (len(found) == len(MODELS) or None), ", ".join(said)


def judge_higher(alex, res):
    (a, m), (r, n) = ((reached(group), len(group[0].rows)) for group in (alex, res))
    low, high = mean(a), mean(r)
    if min(len(a), len(r)) > 1 and np.ptp(a) + np.ptp(r) > 0:
        chance = p_value(a, r)
        close, doubt = chance >= 0.05, f"p = {chance:.2g}"
    else:  # of the images, and of the seeds on the side that has several: the other has as much
        variance = (low * (1 - low) + high * (1 - high)) / np.sum(alex[0].facts["confusion"])
        variance += sum(np.var(seeds, ddof=1) * (1 + 1 / len(seeds)) for seeds in (a, r) if len(seeds) > 1)
        error = 100 * np.sqrt(variance)
        close, doubt = 100 * abs(high - low) < 2 * error, f"standard error of the difference {error:.2f} points"
    unfair = n > m if high > low else n < m
    return (None if unfair or close else bool(high > low),
            f"{percent(r)} after {n} epochs against {percent(a)} after {m}; {doubt}")


def judge_earlier(*groups):
    first = [[next((row["epoch"] for row in run.rows if row["test_accuracy"] >= 0.9), None) for run in group] for group in groups]
    ends = [len(group[0].rows) for group in groups]
    said = [f"epoch {spread(epochs, 1) if len(epochs) > 1 else epochs[0]}" if all(epochs) else
            f"not within {end} epoch{'s' * (end > 1)}" + f" with {epochs.count(None)} of {len(epochs)} seeds" * (len(epochs) > 1)
            for epochs, end in zip(first, ends)]
    # Of a run that ended before 90 % only bounds of the epoch are known.
    low = [np.mean([e or end + 1 for e in epochs]) for epochs, end in zip(first, ends)]
    high = [np.mean([e or float("inf") for e in epochs]) for epochs in first]
    return True if low[1] - high[0] >= 2 else False if high[1] - low[0] < 2 else None, " against ".join(said)


def judge_time(slow, fast):
    ratio, work = slow.facts["seconds_per_epoch"] / fast.facts["seconds_per_epoch"], slow.size[1] / fast.size[1]
    same = all(slow.facts[key] == fast.facts[key] for key in ("device", "amp"))
    said = ["{seconds_per_epoch:.0f} s ({device}, amp {amp})".format(**run.facts) for run in (slow, fast)]
    said = f"{ratio:.2f} times: {' against '.join(said)}; {work:.3f} times the multiply-adds"
    return ratio >= 1.5 if same else None, said + ("" if same else "; not the same device and amp")


def judge_processes(one, several):
    holds, said = judge_time(one, several)
    shared = all(run.facts["device"].startswith("cpu") for run in (one, several))
    return None if shared else holds, said + "; the processes share the cores, this takes several GPUs" * shared


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
