"""The mode `report`: the study's claims, judged by finished runs, in one page with pictures.

    python caps.py report [RUN_DIR ...]       writes report/report.md and its pictures (docs/report/ was made so)
"""

import csv
import functools
import json
import pathlib
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import torch

from caps import (COLUMNS, EVALUATION_BATCH, LATER, MODELS, RECIPE, UserError, World, class_scores, file_name,
                  load_model, measure, new_model, number, parse, progress, read_checkpoint, set_title)
from caps.extras import compare
from caps.extras.claims import as_coded, claims, nearest, nearness
from caps.extras.datasets import earlier_traits, load_data_for
from caps.extras.diagram import plot_diagram
from caps.extras.faster import keep_freed_memory
from caps.extras.figures import ALL, plot_confusion, plot_curves, plot_roc
from caps.extras.machine import choose_device
from caps.extras.probes import orientation, plot_orientation, plot_robustness, robustness
from caps.extras.runs import check_writable, write_atomically
from caps.extras.summary import layer_table, totals

FACTS = {"train_images": int, "epochs": int, "seconds_per_epoch": float, "parameters": int, "test_accuracy": float,
         "macro_auc": float, "device": str, "layers": str, "world_size": int, "peak_memory_bytes": int,
         "traits": lambda traits: {key: traits[key] for key in earlier_traits("mnist")},
         "confusion": lambda counts: np.reshape(counts, (len(counts), len(counts))).tolist()}
MAY_BE_NULL = {"macro_auc", "peak_memory_bytes", "layers", "size"}  # where they are not to be had, or by default

FEW = 4  # settings that the pictures show all of

# The defaults that several processes have others of, and so a launcher's leftovers.
ONE_PROCESS = "--amp off --accumulate 1 --lr-scale none --warmup 0".split()


def options(add):
    add("--data-dir")
    add("--device")
    add("runs", nargs="*", metavar="RUN_DIR", type=file_name, help="folders of runs; by default all of runs/")
    add("--out", default="report", help="folder to write report.md and its pictures to")
    add("--images", type=number(int, 20), default=2000, metavar="N", help="test images to distort for robustness")


def run(args):
    """report.md and its pictures from finished runs; what cannot be read is named there and on stderr."""
    keep_freed_memory()  # a third less time
    device, out = choose_device(args.device), pathlib.Path(args.out)
    files = (file for file in pathlib.Path("runs").rglob("*") if file.name in ("last.pt", "summary.json"))
    folders = sorted(file.parent for file in files if not file.parent.name.startswith("eval-"))
    records = [read_run(folder) for folder in dict.fromkeys(map(pathlib.Path, args.runs or folders))]
    runs = [run for run in records if run.facts]
    if not runs:
        raise UserError("; ".join(f"{run.folder}: {run.missing[0]}" for run in records) or "report: no run under runs/")
    give_titles(runs)
    check_writable(out)
    warnings.simplefilter("ignore", RuntimeWarning)  # numpy's, of classes without images; their places stay empty
    tested, turned, distorted = {}, {}, {}
    whole = [run for run in runs if run.model]
    print(f"caps: {len(whole)} of {len(runs)} run(s) with a network, which is tested again", file=sys.stderr)
    for run in whole:
        try:
            tested[run.title] = test_again(run, args.data_dir, device)
        except UserError as error:
            run.missing.append(f"not tested, so without ROC, orientation and robustness: {error}")
    able = [run for run in runs if run.title in tested]
    kinds = {}  # by network and decoder; the nearest setting's seeds all judge the claim on orientation, pictures show one
    for group in compare.groups(able):
        kinds.setdefault((group[0].facts["model"], group[0].facts["decoder"] > 0), []).append(group)
    judging = [nearest(found) for found in kinds.values()]
    shown = {group[0].title for group in judging}
    pairs = compare.pairs([run for run in able if run.facts.get("world_size")])  # those that are finished
    compared = {run.title for pair in pairs for kind in pair for run in kind}
    judges = {run.title for group in judging for run in group}
    for run in (run for run in able if run.title in compared | judges):
        images, scores, labels, result = tested[run.title]
        found = orientation(run.model, images, labels, run.facts["amp"])
        if np.bincount(found[2], minlength=1).max() > 5:
            turned[run.title] = found
        else:
            run.missing.append("orientation: fewer than 6 images of each class are recognised")
        if run.title in compared | shown:
            few = (each[::int(np.ceil(len(images) / args.images))] for each in (images, scores, labels))
            distorted[run.title] = robustness(run.model, *few, run.facts["amp"])
            r2 = next(iter(found[3].values()))[0] if run.title in turned else None
            run.knowledge = compare.knowledge(result["test_accuracy"], r2, distorted[run.title])
    fits = {title: found[3] for title, found in turned.items() if title in judges}
    turned, distorted = ({title: found for title, found in results.items() if title in shown}
                         for results in (turned, distorted))
    write_page(out, records, tested, turned, distorted, fits, pairs, args.images)
    for record, what in ((record, what) for record in records for what in record.missing):
        print(f"caps: {record.folder}: {what}", file=sys.stderr)
    print(f"{len(runs)} run(s): {out / 'report.md'}")
    return 0


def give_titles(runs):
    """Titles that differ, with no more in them than that takes; `setting` is what the seeds of a group share."""
    distinguish(runs, compare.setting, lambda run: "".join(f", {change}" for change in run.changes))
    for run in runs:
        run.setting = run.title
    distinguish(runs, lambda run: run.folder, lambda run: f", seed {run.facts['seed']}")
    distinguish(runs, lambda run: run.folder, lambda run: f" ({run.folder})")


def distinguish(runs, what, more):
    """Add `more(run)` to a title that runs of several `what(run)` have in common."""
    kinds = {}
    for run in runs:
        kinds.setdefault(run.title, set()).add(what(run))
    for run in runs:
        run.title += more(run) if len(kinds[run.title]) > 1 else ""


# -------------------------------------------------------------------------------------------- what a run's folder tells


def read_run(folder):
    """What a run's folder tells: `facts` of summary.json, or the recipe in last.pt; `rows` of metrics.csv or last.pt;
    `model`; and `missing`, in words what is not there or damaged. Without facts there is nothing to report."""
    run = SimpleNamespace(folder=pathlib.Path(folder), facts={}, rows=[], model=None, missing=[])
    for name in ("last.pt", "metrics.csv", "summary.json"):
        try:
            vars(run).update({k: told for k, told in read_part(run.folder / name).items() if told})
        except Exception as error:  # a damaged file leads to a dozen kinds
            damage = f"is damaged: {error}".splitlines()[0]
            run.missing.append(f"{name} {damage if (run.folder / name).exists() else 'is not there'}")
    if run.facts and run.rows and len(run.rows) != run.facts["epochs"]:
        run.missing.append(f"summary.json is of {run.facts['epochs']} epochs, metrics.csv of {len(run.rows)}: unfinished")
        run.facts = {k: run.facts[k] for k in (*RECIPE, "traits", "layers") if k in run.facts} | {
            "epochs": len(run.rows), "test_accuracy": run.rows[-1]["test_accuracy"]}
    if run.facts:
        model, count, dataset = (run.facts.get(k) for k in ("model", "world_size", "dataset"))
        traits, run.classes = run.facts["traits"], run.facts["traits"]["classes"]
        processes = f"{count} process{'es' if count > 1 else ''}" if count else "unfinished"
        decoder = " with decoder" * (run.facts["decoder"] > 0)
        run.title = f"{MODELS[model].__name__}{decoder}, {processes}{'' if dataset == 'mnist' else f', {set_title(dataset)}'}"
        run.study_sized = traits["image"] == [1, 28, 28] and len(traits["classes"]) == 10
        run.full = bool(run.rows) and run.study_sized and (dataset, run.facts.get("train_images")) == ("mnist", 60_000)
        study = vars(parse(["train", "--dataset", "mnist", *ONE_PROCESS]))  # the defaults are the study's recipe
        run.departures = ["plain layers"] * (run.facts.get("layers") == "plain") + [
            f"{k.replace('_', '-')} {run.facts[k]}" for k in RECIPE[1:] if k != "seed" and run.facts[k] != study[k]]
        epochs = run.facts["epochs"]
        run.changes = [f"{epochs} epoch{'s' * (epochs > 1)}"] * (epochs != study["epochs"])
        run.changes += [text for text in run.departures if text.split()[0] != "dataset" and text != "decoder 0.0005"]
        if (count or 1) > 1:  # which have other defaults than the study: these are named even where they are the study's
            run.changes += [f"{k.replace('_', '-')} {run.facts[k]}" for k in ("lr_scale", "warmup") if run.facts[k] == study[k]]
        run.setting = run.title
        if run.rows:
            run.facts["seconds_per_epoch"] = float(np.median([row["seconds"] for row in run.rows]))
        run.network = run.model or new_model(run.facts, traits)
        run.size = totals(layer_table(run.network))
    return run


def read_part(path):
    """What one file of a run's folder tells: some of `facts`, `rows` and `model`."""
    if path.suffix == ".pt":
        checkpoint = read_checkpoint(path)
        rows, recipe = checkpoint["history"], {k: checkpoint["config"][k] for k in RECIPE}
        reached = {"test_accuracy": row["test_accuracy"] for row in rows[-1:]}
        return {"facts": recipe | reached | {"epochs": len(rows), "traits": checkpoint["traits"]}, "rows": rows,
                "model": load_model(checkpoint, torch.device("cpu")), "checkpoint": checkpoint}
    if path.suffix == ".csv":
        kinds = dict.fromkeys(COLUMNS, float) | {"epoch": int, "dataset": str}
        with open(path, newline="") as file:
            return {"rows": [{k: kinds[k](row[k]) for k in COLUMNS} for row in csv.DictReader(file)]}
    facts = {"traits": None, "layers": None} | LATER | json.loads(path.read_text())
    if facts["model"] not in MODELS:
        raise ValueError(f"unknown model {facts['model']}")
    if facts["traits"] is None:
        facts["traits"] = earlier_traits(facts["dataset"])
    if null := {k for k in (*RECIPE, *FACTS) if facts[k] is None} - MAY_BE_NULL:
        raise ValueError(f"{', '.join(sorted(null))}: null")
    with torch.device("meta"):
        new_model(facts, facts["traits"])
    return {"facts": {k: facts[k] for k in RECIPE} | {k: kind(facts[k]) for k, kind in FACTS.items() if facts[k] is not None}}


def test_again(run, data_dir, device):
    """A run's model on its test set: (images, class scores [n, J], labels [n], `measure`'s dictionary)."""
    data = load_data_for(run.checkpoint, None, data_dir, run.facts["holdout"]).to(device)
    run.model.to(device)
    scores = torch.cat([class_scores(run.model, part, World(0, 1, device), run.facts["amp"])
                        for part in progress(run.title, data.test_images.split(5 * EVALUATION_BATCH))])
    result = measure(scores, data.test_labels) | {"classes": run.classes}
    if abs(result["test_accuracy"] - run.facts.get("test_accuracy", result["test_accuracy"])) > 0.002:
        run.missing.append(f"last.pt has a test accuracy of {100 * result['test_accuracy']:.2f} %, not the run's")
    return data.test_images, scores, data.test_labels, result


# ------------------------------------------------------------------------------------------------------------- the page


def write_page(out, records, tested, turned, distorted, fits, pairs, images):
    """report.md and its pictures in the folder `out`; results are by title, `fits` of all seeds that judge, `images` at
    most were distorted, `pairs` are compare's."""
    def section(title, name, plot, content, *text):
        path = out / f"{name}.png"
        path.unlink(missing_ok=True)
        if content:
            plot(content, path)
        shown = f"![{title.strip('# ')}]({path.name})" if content else "Not drawn: no run has what it takes."
        return "\n\n".join([title, shown, *text])

    runs = [run for run in records if run.facts]
    settings = compare.groups(runs)
    drawn = in_pictures(settings)
    classes = {run.title: run.classes for run in runs}
    tables = [f"**{title}**\n\n" + markdown([
        {"angle fitted from": kind, "R²": f"**{np.nanmean(r2):.2f}**", "mean error": f"{np.nanmean(error):.1f}°"}
        | {f"R² of {name}": None if np.isnan(r2[c]) else f"{r2[c]:.2f}" for c, name in enumerate(classes[title]) if len(r2) <= ALL}
        for kind, (r2, error) in fit.items()]) for title, (_, _, _, fit) in turned.items()]
    networks = {run.facts["model"]: run for run in sorted(runs, key=lambda run: (not run.facts["decoder"], nearness(run)))}
    parts = [
        "# AlexCapsNet and ResCapsNet, claim by claim",
        "Written by `caps.py report` from the files of finished runs. Accuracies are those after the last epoch; "
        "no run and no epoch was chosen by its test accuracy. A run whose loss is no longer finite stops and is not "
        "among them.",
        "## Results", markdown([results_row(group, runs) for group in settings]),
        "Of several seeds means ± standard deviations. Seconds, images/s and memory are those of the fastest run of a "
        "setting on a CPU, or on that GPU, whatever epochs, threads and learning rate it had, times medians over its epochs. "
        "One CPU is not told from another.",
        "## What the study claims", markdown(claims(runs, fits)),
        "Judged by finished runs on full MNIST without a decoder, which the study has not; of several, by that with the "
        "most epochs, as many as the study's counted, then the one nearest to its recipe; on time by the fastest of those "
        "nearest to it.",
        "The study's published code does otherwise than its text. With its options:", markdown(as_coded(runs)),
        section("## Accuracy and loss", "curves", plot_curves, {run.title: run.rows for run in drawn if run.rows},
                "Of runs that differ in their seed alone, the pictures show those of the lowest; of more settings than "
                f"{FEW} those nearest to the study's, with one process and with several, and none of a single epoch. The table "
                "above has all."),
        section("## Confusion matrices", "confusion", plot_confusion,
                {run.title: run.facts | {"classes": run.classes} for run in drawn if "confusion" in run.facts}),
        section("## ROC, one class against the rest", "roc", plot_roc,
                {run.title: tested[run.title][1:] for run in drawn if run.title in tested}),
        "## Architectures", *(section(f"### {MODELS[model].__name__}", f"diagram-{model}",
                                      functools.partial(plot_diagram, traits=run.facts["traits"]), run.network)
                              for model, run in networks.items()),
        section("## Do capsules preserve orientation?", "orientation",
                functools.partial(plot_orientation, classes=classes), turned,
                "Every test image is rotated by a random angle in ±30°. For each class a ridge regression is fitted to "
                "every other image of those that are still recognised, its penalty chosen there, and scored on the "
                "rest, its answers cut to ±30°. Guessing 0° has an R² of 0 and a mean error of 15°. Two of these "
                "rules, recognised images only and the cut, were added after a first fit on test images of AlexCapsNet "
                "without them, in which a few misread digits outweighed all others; the whole test set, in place of "
                "2,000 of its images, came later still; the criterion is older than all three. The claim is judged by the "
                "means over all seeds of a setting whose networks are there; picture and tables are of the lowest. The "
                "picture shows the capsule dimensions that vary most with the angle.", *tables),
        section("## Robustness", "robustness", plot_robustness, distorted,
                f"{images:,} test images at most, evenly over the test set, rotated or shifted sideways, every other "
                "one to the other side, or with Gaussian noise and cut to [0, 1]."),
        "## What a decoder changes",
        *([markdown([row for pair in pairs for row in compare.rows(pair)]), *map(compare.verdict, pairs),
           "Mean ± standard deviation over seeds; R² is that of the 16 numbers of the winning capsule; accuracies under a "
           "distortion are means over its levels above. A difference is shown where Welch's t-test, corrected for the "
           "number of measures after Holm, says less than 5 %."] if pairs else
          ["Not measured: there are no finished runs with and without `--decoder` of as many epochs and the same options "
           "but `--seed`."]),
        "## What is wrong with these runs",
        "\n".join(f"* {', '.join(folders[:3])}{f' and {len(folders) - 3} more' * (len(folders) > 3)}: {what}"
                  for what, folders in missing(records).items()) or "Nothing."]
    write_atomically(out / "report.md", lambda file: file.write_text("\n\n".join(parts) + "\n", "utf-8", "replace"))


def in_pictures(settings):
    """A run of each setting; of many settings one for each data set, network, and one or several processes, without
    those of a single epoch, which have no curve, if there are others."""
    runs = [group[0] for group in settings]
    if len(runs) <= FEW:
        return runs
    runs = [run for run in runs if run.facts["epochs"] > 1] or runs
    return list({(run.facts["dataset"], run.facts["model"], run.facts["decoder"] > 0, run.facts.get("world_size", 0) > 1): run
                 for run in sorted(runs, key=nearness)}.values())


def missing(records):
    """{what is missing: the folders it is missing in}."""
    found = {}
    for record in records:
        for what in record.missing:
            found.setdefault(what, []).append(f"`{record.folder}`")
    return found


def results_row(group, runs):
    """A row on runs of one setting; times and memory are of the quietest among all `runs`."""
    quiet = compare.quietest(group, runs)
    devices = list(dict.fromkeys(run.facts["device"] for run in group if "device" in run.facts))
    if devices and devices != [quiet.facts["device"]]:
        devices.append(f"times: {quiet.facts['device']}")
    first, one_parent = group[0], len({run.folder.parent for run in group}) == 1

    def fact(key, form, scale=1):
        return form.format(scale * quiet.facts[key]) if key in quiet.facts else None

    def average(key, digits, scale=1, unit=""):
        known = [scale * run.facts[key] for run in group if key in run.facts]
        return compare.spread(known, digits) + unit if len(known) == len(group) else None

    return {"run": first.setting, "setting, but for the study's with 1 process": ", ".join(first.departures) or None,
            "seeds": ", ".join(f"{run.facts['seed']}" for run in group), "test accuracy": average("test_accuracy", 2, 100, " %"),
            "epochs": first.facts["epochs"], "parameters": f"{first.size[0]:,}", "multiply-adds an image": f"{first.size[1]:,}",
            "seconds an epoch": fact("seconds_per_epoch", "{:,.0f}"),
            "images/s": f"{np.median([row['images_per_second'] for row in quiet.rows]):,.0f}" if quiet.rows else None,
            "peak memory a process": fact("peak_memory_bytes", "{:,.0f} MiB", 2**-20), "macro AUC": average("macro_auc", 5),
            "processes": first.facts.get("world_size"),
            "device": "; ".join(devices) or None,
            "folders": ", ".join(f"`{run.folder.name if one_parent and run is not first else run.folder}`" for run in group)}


def markdown(rows):
    """A Markdown table of dictionaries with the same keys; None is a dash."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(row.values() for row in rows)]
    return "\n".join("| " + " | ".join("–" if cell is None else str(cell).replace("|", "\\|") for cell in line) + " |"
                     for line in lines)
