"""Finished runs read as far as they go, the study's claims judged by them, and the page."""
import json
import shutil

import numpy as np
import pytest
import torch
from common import command, no_download, refused
from PIL import Image

import caps
from caps.extras import claims, probes, report, results, runs


def hand_made(folder, model="alexcaps", accuracies=(0.95, 0.97), losses=None, **changes):
    """A run's folder with the two text files that training leaves there."""
    folder.mkdir(parents=True)
    losses, seconds = losses or [0.1 * 0.9 ** epoch for epoch in range(len(accuracies))], changes.get("seconds_per_epoch", 100.0)
    rows = [dict(zip(caps.COLUMNS, (epoch, loss, accuracy, loss, accuracy, 1e-3, seconds, 600.0, "mnist")))
            for epoch, (loss, accuracy) in enumerate(zip(losses, accuracies), 1)]
    runs.write_metrics(folder / "metrics.csv", rows)
    recipe = vars(caps.parse(["train"]))
    results.write_json(folder / "summary.json", {k: recipe[k] for k in caps.RECIPE} | {
        "model": model, "dataset": "mnist", "train_images": 60_000, "epochs": len(rows), "parameters": 2_683_840,
        "seconds_per_epoch": 100.0, "test_accuracy": accuracies[-1], "macro_auc": 0.999, "device": "cpu, 1 threads",
        "confusion": (1000 * np.eye(10, dtype=int)).tolist(), "world_size": 1, "peak_memory_bytes": 2**30} | changes)
    return folder


def read_runs(*folders):
    return [report.read_run(folder) for folder in folders]


def res(accuracies=(0.95, 0.97), **changes):
    return {"model": "rescaps", "parameters": 2_022_272, "accuracies": accuracies} | changes


def alex(accuracies=(0.95, 0.97), **changes):
    return {"accuracies": accuracies} | changes


def gpu(**changes):
    return alex(device="NVIDIA H100", **changes)


DECODED = "Capsules preserve digit orientation, the same with a decoder"
HOLDS, FAILS, UNKNOWN = "holds", "**does not hold**", "not measured"
R2 = {"both": ((0.6, 0.1), (0.5, 0.2)), "short": ((0.6, 0.1), (0.4, 0.2)), "length": ((0.6, 0.1), (0.6, 0.7))}


@pytest.mark.parametrize("claim, specs, verdict, words", [
    ("AlexCapsNet: 98.06", [alex([0.9] * 9 + [0.9806] + [0.1] * 10)], HOLDS, ["98.06 % after 10 of 10"]),
    ("AlexCapsNet: 98.06", [alex([0.99] * 9 + [0.9805] + [0.99] * 10)], FAILS, ["98.05 % after 10 of 10"]),
    ("AlexCapsNet: 98.06", [alex([0.9, 0.98])], UNKNOWN, ["98.00 % after 2 of 10"]),
    ("AlexCapsNet: 98.06", [alex([0.9, 0.981])], HOLDS, ["98.10 % after 2 of 10"]),
    ("AlexCapsNet: 98.06", [alex([0.99] * 20, world_size=4)], UNKNOWN, ["no finished run", "1 process"]),
    ("AlexCapsNet: 98.06", [alex([0.99] * 20, dataset="mnist5k", train_images=4000)], UNKNOWN, ["no finished run"]),
    ("AlexCapsNet: 98.06", [alex([0.99] * 20, holdout=5000, train_images=55_000)], UNKNOWN, ["no finished run"]),
    ("AlexCapsNet: 96.28", [alex([0.9] * 19 + [0.9628], world_size=4)], HOLDS, ["96.28 % after 20 of 20"]),
    ("AlexCapsNet: 96.28", [alex([0.99] * 19 + [0.9627], world_size=4)], FAILS, ["96.27"]),
    ("AlexCapsNet: 96.28", [alex([0.99] * 20)], UNKNOWN, ["several processes"]),
    ("ResCapsNet: 98.70", [res([0.9] * 19 + [0.987])], HOLDS, ["98.70"]),
    ("ResCapsNet: 98.70", [res([0.99] * 19 + [0.9869])], FAILS, ["98.69"]),
    ("ResCapsNet: 98.70", [res([0.9, 0.9865])], UNKNOWN, ["after 2 of 20"]),
    ("ResCapsNet: 97.86", [res([0.9] * 9 + [0.9786], world_size=2)], HOLDS, ["97.86"]),
    ("ResCapsNet: 97.86", [res([0.99] * 9 + [0.9785], world_size=2)], FAILS, ["97.85"]),
    ("ResCapsNet: 97.86", [res([0.9, 0.9], world_size=2)], UNKNOWN, ["after 2 of 10"]),
    ("ResCapsNet ends", [alex([0.9, 0.97]), res([0.9, 0.98])], HOLDS, ["98.00", "97.00", "0.22 points"]),
    ("ResCapsNet ends", [alex([0.9, 0.98]), res([0.9, 0.97])], FAILS, []),
    ("ResCapsNet ends", [alex([0.9, 0.97]), res([0.9, 0.974])], UNKNOWN, ["0.23 points"]),
    ("ResCapsNet ends", [alex([0.97]), res([0.9, 0.98])], UNKNOWN, []),
    ("ResCapsNet ends", [alex([0.9, 0.98]), res([0.97])], UNKNOWN, []),
    ("ResCapsNet ends", [alex([0.9, 0.97]), res([0.98])], HOLDS, []),
    ("ResCapsNet ends", [alex([0.98]), res([0.9, 0.97])], FAILS, []),
    ("ResCapsNet ends", [alex()], UNKNOWN, ["ResCapsNet"]),
    # Three seeds each: a difference of 0.20 points is shown where they lie close together, and not where they do not.
    ("ResCapsNet ends", [alex([0.9, a], seed=n) for n, a in enumerate((0.9799, 0.98, 0.9801))]
     + [res([0.9, a], seed=n) for n, a in enumerate((0.9819, 0.982, 0.9821))], HOLDS,
     ["98.20 ± 0.01 %, n = 3", "98.00 ± 0.01 %, n = 3", "p = 1.6e-05"]),
    ("ResCapsNet ends", [alex([0.9, a], seed=n) for n, a in enumerate((0.978, 0.98, 0.982))]
     + [res([0.9, a], seed=n) for n, a in enumerate((0.980, 0.982, 0.984))], UNKNOWN, ["p = 0.29"]),
    ("ResCapsNet ends", [alex([0.9, a], seed=n) for n, a in enumerate((0.978, 0.982))]
     + [res([0.9, a], seed=n) for n, a in enumerate((0.9834, 0.9835, 0.9835, 0.9835, 0.9836))], UNKNOWN,
     ["p = 0.33"]),  # Student's test says 0.02
    # Where no seed differs from another the test images' own error decides.
    ("ResCapsNet ends", [alex([0.9, 0.97], seed=n) for n in (1, 2)] + [res([0.9, 0.99], seed=n) for n in (1, 2)], HOLDS,
     ["0.20 points"]),
    ("ResCapsNet ends", [alex([0.9, 0.989], seed=n) for n in (1, 2)] + [res([0.9, 0.9891], seed=n) for n in (1, 2)], UNKNOWN, []),
    # Of a single seed against several their deviation is its own: 1.15 points, and 0.19 of the images.
    ("ResCapsNet ends", [alex([0.9, a], seed=n) for n, a in enumerate((0.97, 0.98, 0.99))] + [res([0.9, 0.985])], UNKNOWN,
     ["error of the difference 1.17 points"]),
    ("ResCapsNet ends", [alex([0.9, a], seed=n) for n, a in enumerate((0.97, 0.98, 0.99))] + [res([0.9, 0.999])], UNKNOWN, []),
    ("ResCapsNet ends", [alex([0.9, a], seed=n) for n, a in enumerate((0.9799, 0.98, 0.9801))] + [res([0.9, 0.985])], HOLDS, []),
    # A run that went on after its summary, and stopped, is not finished, nor one of another's group.
    ("ResCapsNet ends", [alex([0.9, 0.97]), alex([0.9, 0.97, 0.99], epochs=2, seed=2), res([0.9, 0.99])], HOLDS,
     ["against 97.00 % after 2"]),
    ("AlexCapsNet: 98.06", [alex([0.9] * 10), alex([0.9] * 5, epochs=10, seed=2)], FAILS, ["90.00 % after 10 of 10"]),
    # The study's recipe with the claim's epochs, not another with more.
    ("AlexCapsNet: 98.06", [alex([0.97] * 10), alex([0.99] * 20, lr=0.01)], FAILS, ["97.00 % after 10 of 10"]),
    ("ResCapsNet: 98.70", [res([0.98] * 10), res([0.99] * 20, lr=0.01)], HOLDS, ["99.00 % after 20 of 20 epochs (lr 0.01)"]),
    # What a resumed and stopped run says last counts, not its older summary.
    ("ResCapsNet ends", [alex([0.9, 0.99], test_accuracy=0.95), res([0.9, 0.97])], FAILS, ["97.00", "99.00"]),
    ("AlexCapsNet: 98.06", [alex([0.9] * 9 + [0.9806], seed=n) for n in range(3)], HOLDS, ["98.06 ± 0.00 %"]),
    # The study's own recipe judges, whichever its seeds.
    ("AlexCapsNet: 98.06", [alex([0.99] * 10, ema=0.999), alex([0.97] * 10, seed=2), alex([0.97] * 10, seed=3)], FAILS,
     ["97.00 ± 0.00 %, n = 2"]),
    ("AlexCapsNet: 98.06", [alex([0.99] * 10, lr=0.002), alex([0.97] * 10, ema=0.9), alex([0.97] * 10, ema=0.9, seed=3)], FAILS,
     ["n = 2"]),
    ("AlexCapsNet: 98.06", [alex([0.99] * 10, layers="plain"), alex([0.97] * 10, seed=2)], FAILS, ["97.00 %"]),
    # One seed below, the mean above, and the other way round.
    ("AlexCapsNet: 98.06", [alex([0.9] * 9 + [a], seed=n) for n, a in enumerate((0.98, 0.985, 0.98))], HOLDS,
     ["98.17 ± 0.29 %, n = 3"]),
    ("AlexCapsNet: 98.06", [alex([0.9] * 9 + [a], seed=n) for n, a in enumerate((0.981, 0.98, 0.98))], FAILS, ["98.03"]),
    ("ROC", [alex(macro_auc=0.998), alex(macro_auc=0.98, seed=2), res(macro_auc=0.995)], FAILS, ["0.98900 ± 0.01273"]),
    ("ROC", [alex(macro_auc=0.99, seed=n) for n in range(3)] + [res(macro_auc=0.99, seed=n) for n in range(3)], HOLDS, []),
    ("ROC", [alex(macro_auc=None), res(macro_auc=0.99)], UNKNOWN, ["no AlexCapsNet that counts, ResCapsNet 0.99"]),
    ("An AlexCapsNet epoch", [alex(seconds_per_epoch=s, seed=n) for n, s in enumerate((170.0, 149.0))] + [res()], FAILS, ["149 s"]),
    ("AlexCapsNet reaches", [alex([0.9, 0.9]), res([0.8, 0.9]), res([0.8, 0.8], seed=2)], UNKNOWN,
     ["not within 2 epochs with 1 of 2 seeds"]),
    ("AlexCapsNet reaches", [alex([0.9, 0.9, 0.9]), res([0.8, 0.89, 0.9]), res([0.8, 0.9, 0.9], seed=2)], FAILS,
     ["epoch 1 against epoch 2.5 ± 0.7"]),
    ("AlexCapsNet reaches", [alex([0.9, 0.9, 0.9]), res([0.8, 0.89, 0.9])], HOLDS, ["epoch 1 against epoch 3"]),
    ("AlexCapsNet reaches", [alex([0.9, 0.9]), res([0.8, 0.9])], FAILS, ["epoch 1 against epoch 2"]),
    ("AlexCapsNet reaches", [alex([0.9, 0.9]), res([0.8, 0.8])], HOLDS, ["not within 2 epochs"]),
    ("AlexCapsNet reaches", [alex([0.9, 0.9]), res([0.8])], UNKNOWN, ["not within 1 epoch"]),
    ("AlexCapsNet reaches", [alex([0.8, 0.8]), res([0.8, 0.9])], FAILS, []),
    ("ROC", [alex(macro_auc=0.99), res(macro_auc=0.995)], HOLDS, ["AlexCapsNet 0.99000, ResCapsNet 0.99500"]),
    ("ROC", [alex(macro_auc=0.999), res(macro_auc=0.9899)], FAILS, []),
    ("ROC", [alex(macro_auc=0.999)], UNKNOWN, []),
    ("AlexCapsNet has", [alex(), res()], FAILS, ["2.68 million", "2.02 million"]),
    ("AlexCapsNet has", [alex(parameters=30_000_000), res()], HOLDS, ["30.00 million"]),
    ("AlexCapsNet has", [alex(parameters=30_000_000)], UNKNOWN, []),
    ("AlexCapsNet has", [alex(parameters=30_000_000), res(parameters=10_000_000)], FAILS, []),
    ("An AlexCapsNet epoch", [alex(seconds_per_epoch=150.0), res()], HOLDS, ["1.50 times", "0.049 times the multiply-adds"]),
    ("An AlexCapsNet epoch", [alex(seconds_per_epoch=149.0), res()], FAILS, ["1.49 times"]),
    ("An AlexCapsNet epoch", [alex(seconds_per_epoch=150.0), res(device="cpu, 2 threads")], UNKNOWN, ["not the same"]),
    ("An AlexCapsNet epoch", [alex(), res(amp="bf16"), alex(seconds_per_epoch=150.0, amp="bf16")], HOLDS, ["1.50", "amp bf16"]),
    ("An AlexCapsNet epoch", [alex(seconds_per_epoch=300.0), res(), alex(accuracies=[0.9], seconds_per_epoch=90.0, device="cpu, 2 threads"),
                              res(accuracies=[0.9], seconds_per_epoch=50.0, device="cpu, 2 threads")], HOLDS, ["1.80 times"]),
    ("An AlexCapsNet epoch", [alex(seconds_per_epoch=300.0), res(), alex(accuracies=[0.9], seconds_per_epoch=90.0),
                              res(accuracies=[0.9], seconds_per_epoch=95.0)], FAILS, ["0.95 times"]),
    ("Several", [gpu(), gpu(seconds_per_epoch=50.0, world_size=4)], HOLDS, ["2.00 times"]),
    ("Several", [gpu(), gpu(seconds_per_epoch=80.0, world_size=4)], FAILS, ["1.25 times"]),
    ("Several", [gpu(), gpu(seconds_per_epoch=50.0, world_size=4, amp="bf16")], UNKNOWN, ["not the same device and amp"]),
    ("Several", [gpu(), gpu(accuracies=[0.9], seconds_per_epoch=50.0, world_size=4, lr_scale="sqrt", warmup=1.0),
                 gpu(seconds_per_epoch=90.0, world_size=4)], HOLDS, ["2.00 times"]),  # a learning rate costs no time
    ("Several", [gpu(), gpu(seconds_per_epoch=50.0, world_size=4, shift=2.0), gpu(seconds_per_epoch=80.0, world_size=4)], FAILS,
     ["1.25 times"]),
    ("Several", [alex(seconds_per_epoch=80.0, device="cpu, 2 threads"), alex(device="cpu, 2 threads", amp="bf16"),
                 alex(seconds_per_epoch=90.0, world_size=2, amp="bf16")], UNKNOWN, ["1.11 times", "not the same device", "share"]),
    ("Several", [alex(), alex(seconds_per_epoch=50.0, world_size=4)], UNKNOWN, ["2.00 times", "share the cores"]),
    ("Several", [alex()], UNKNOWN, []),
    ("The loss", [alex([0.9] * 3, losses=[3.0, 2.0, 1.0])], HOLDS, ["fell in 2 of 2"]),
    ("The loss", [alex([0.9] * 3, losses=[1.0, 2.0, 1.0])], FAILS, ["fell in 1 of 2", "100.0 %"]),
    ("The loss", [alex([0.9] * 12, losses=[1 - i / 20 for i in range(11)] + [0.6])], FAILS, ["fell in 10 of 11", "20.0 %"]),
    ("The loss", [alex([0.9] * 3, losses=[3.0, 2.0, 1.0]), alex([0.9] * 3, losses=[1.0, 2.0, 3.0], lr=0.01)], HOLDS, ["1 run(s)"]),
    ("The loss", [alex([0.9] * 3, losses=[3.0, 2.0, 1.0]), res([0.9] * 3, losses=[1.0, 2.0, 3.0], seed=2)], FAILS, ["2 run(s)"]),
    ("The loss", [alex([0.9])], UNKNOWN, []),
    ("The loss", [alex(dataset="mnist5k")], UNKNOWN, []),
    ("No instability", [alex([0.95, 0.935, 0.95])], HOLDS, ["1.50 points"]),
    ("No instability", [alex([0.95, 0.929, 0.95])], FAILS, ["2.10 points"]),
    ("No instability", [alex(losses=[0.1, float("nan")])], FAILS, ["not finite"]),
    ("No instability", [alex(iterations=1)], UNKNOWN, []),
    ("Capsules", [alex(), res(), R2["both"]], HOLDS, ["0.60", "0.50"]),
    ("Capsules", [alex(), res(), R2["short"]], FAILS, ["0.40"]),
    ("Capsules", [alex(), res(), R2["length"]], FAILS, ["0.70"]),
    ("Capsules", [alex(), R2["both"]], UNKNOWN, ["no ResCapsNet that counts"]),
    ("Capsules", [alex(), R2["short"][::-1]], FAILS, ["no ResCapsNet that counts"]),
    ("Capsules", [alex(), res()], UNKNOWN, []),
    ("Capsules", [alex(), alex(seed=2), res(), ((0.6, 0.1), (0.42, 0.2), (0.5, 0.1))], HOLDS, ["0.51 ± 0.13, n = 2", "0.15 ± 0.07"]),
    ("Capsules", [alex(), alex(seed=2), res(), ((0.6, 0.1), (0.38, 0.2), (0.5, 0.1))], FAILS, ["0.49 ± 0.16"]),
    ("Capsules", [alex(), res(), alex(decoder=5e-4), R2["both"]], HOLDS, ["0.60", "0.50"]),
    (DECODED, [alex(decoder=5e-4), res(decoder=5e-4), R2["both"]], HOLDS, ["0.60", "0.50"]),
    (DECODED, [alex(), res(decoder=5e-4), R2["short"]], FAILS, ["no AlexCapsNet that counts", "0.40"]),
    ("AlexCapsNet: 98.06", [alex([0.99] * 20, decoder=5e-4)], UNKNOWN, ["no finished run"]),
    ("AlexCapsNet has", [alex(decoder=5e-4, parameters=30_000_000), res()], UNKNOWN, ["no AlexCapsNet that counts"]),
])
def test_claims(tmp_path, claim, specs, verdict, words):
    r2 = [spec for spec in specs if isinstance(spec, tuple)]
    runs = read_runs(*(hand_made(tmp_path / str(i), **spec) for i, spec in enumerate(specs) if isinstance(spec, dict)))
    report.give_titles(runs)
    fits = {run.title: {kind: (np.full(10, x), np.zeros(10)) for kind, x in zip("clp", (*pair, 0.9))}
            for run, pair in zip(runs, r2[0] if r2 else ())}
    row, = [row for row in report.claims(runs, fits) if row["the study"].startswith(claim) and (
        ("with a decoder" in row["the study"]) == ("decoder" in claim))]
    assert row["verdict"] == verdict and all(word in row["measured here"] for word in words), row


def test_the_run_that_judges_is_not_chosen_by_its_accuracy(tmp_path):
    better = hand_made(tmp_path / "a", accuracies=[0.99] * 10, ema=0.999)
    plain = hand_made(tmp_path / "b", accuracies=[0.97] * 10)
    short = hand_made(tmp_path / "c", accuracies=[0.995] * 4)
    assert [run.folder for run in claims.reference(read_runs(better, plain, short), "alexcaps", False)] == [plain]
    assert [run.folder for run in claims.reference(read_runs(better, short), "alexcaps", False)] == [better]


def test_seeds_of_a_setting_are_one_row_and_titles_tell_settings_apart(tmp_path):
    accuracies = {"plain": (0.9712, 0.9730, 0.9700), "longer": (0.98,), "shifted": (0.97, 0.98)}
    changes = {"plain": {}, "longer": {}, "shifted": {"shift": 2.0}}
    runs = read_runs(*(hand_made(tmp_path / name / str(seed), accuracies=[0.9, 0.95, value][-3 if name == "longer" else -2:], seed=seed,
                                 seconds_per_epoch=90.0 + seed, peak_memory_bytes=seed * 2**20, **changes[name])
                       for name, values in accuracies.items() for seed, value in enumerate(values, 1)))
    runs += read_runs(hand_made(tmp_path / "again" / "1", accuracies=[0.95, 0.9712]))  # a seed counts once
    report.give_titles(runs)
    plain = "AlexCapsNet, 1 process, 2 epochs"
    assert [run.title for run in runs] == [
        f"{plain}, seed 1 ({tmp_path}/plain/1)", f"{plain}, seed 2", f"{plain}, seed 3", "AlexCapsNet, 1 process, 3 epochs",
        f"{plain}, shift 2.0, seed 1", f"{plain}, shift 2.0, seed 2", f"{plain}, seed 1 ({tmp_path}/again/1)"]
    rows = [report.results_row(group, runs) for group in report.compare.groups(runs)]
    assert [(row["run"], row["seeds"], row["test accuracy"]) for row in rows] == [
        (plain, "1, 2, 3", "97.14 ± 0.15 %"), (plain, "1", "97.12 %"), ("AlexCapsNet, 1 process, 3 epochs", "1", "98.00 %"),
        (f"{plain}, shift 2.0", "1, 2", "97.50 ± 0.71 %")]
    assert [rows[0][key] for key in ("seconds an epoch", "images/s", "peak memory a process",
                                     "setting, but for the study's with 1 process", "folders")] == [
        "91", "600", "1 MiB", None, f"`{tmp_path}/plain/1`, `2`, `3`"]  # of the fastest
    assert rows[3]["setting, but for the study's with 1 process"] == "shift 2.0"
    # A run of fewer epochs, with nothing beside it, tells the time of all.
    runs += read_runs(hand_made(tmp_path / "epoch", accuracies=[0.9], seconds_per_epoch=50.0, peak_memory_bytes=2**25,
                                device="cpu, 2 threads"))
    row = report.results_row(runs[:3], runs)
    assert [row[key] for key in ("test accuracy", "seconds an epoch", "peak memory a process", "device")] == [
        "97.14 ± 0.15 %", "50", "32 MiB", "cpu, 1 threads; times: cpu, 2 threads"]
    assert report.results_row(runs[4:6], runs)["seconds an epoch"] == "91"  # of another setting
    runs += read_runs(hand_made(tmp_path / "rate", accuracies=[0.9], seconds_per_epoch=40.0, lr=0.002))  # which takes no time
    assert report.results_row(runs[:3], runs)["seconds an epoch"] == "40"
    runs += read_runs(hand_made(tmp_path / "gpu", accuracies=[0.9], seconds_per_epoch=2.0, device="NVIDIA H100"))
    assert report.results_row(runs[:3], runs)["seconds an epoch"] == "40" and report.results_row(runs[-1:], runs)["seconds an epoch"] == "2"


def test_pictures_of_many_settings_show_those_nearest_to_the_studys(tmp_path):
    specs = [alex(seed=3, ema=0.9), alex(seed=2), alex(seed=4), alex(world_size=4, accumulate=4), alex(world_size=4), res(lr=0.002),
             alex(dataset="mnist5k", train_images=4000)]
    runs = read_runs(*(hand_made(tmp_path / str(number), **spec) for number, spec in enumerate(specs)))
    drawn = report.in_pictures(report.compare.groups(runs))
    assert {int(run.folder.name) for run in drawn} == {1, 4, 5, 6}
    assert [run.folder.name for run in report.in_pictures(report.compare.groups(runs[:4]))] == ["0", "1", "3"]
    report.give_titles(runs)
    assert runs[3].title == "AlexCapsNet, 4 processes, 2 epochs, accumulate 4, lr-scale none, warmup 0.0"
    runs += read_runs(hand_made(tmp_path / "7", **res([0.9], world_size=4)))  # a point is no curve
    assert {int(run.folder.name) for run in report.in_pictures(report.compare.groups(runs))} == {1, 4, 5, 6}
    short = read_runs(*(hand_made(tmp_path / f"1{number}", **alex([0.9], lr=0.001 * number)) for number in range(1, 6)))
    assert [run.folder.name for run in report.in_pictures(report.compare.groups(short))] == ["11"]
    for number in range(5):
        runs[number].missing = ["last.pt is not there"]
    assert [len(folders) for folders in report.missing(runs[:5]).values()] == [5]


def test_options_of_the_studys_code_are_recognised(tmp_path):
    code = {"batch_size": 128, "gamma": 1, "accuracies": [0.975] * 10}
    several = {"world_size": 4, "batch_size": 128, "accumulate": 4, "gamma": 1, "amp": "bf16"}
    none = "no finished run"
    specs = [alex([0.98] * 20), alex(**code), alex(**code | {"accuracies": [0.97] * 20}), alex(**code | {"shift": 2.0}),
             alex(**code | {"decoder": 5e-4}), alex([0.9627] * 20, **several), alex([0.987] * 20, world_size=4),
             alex([0.97] * 20, **several | {"batch_size": 32}), alex(**code | {"accuracies": [0.99] * 10, "accumulate": 4}),
             res([0.5], rotate=0.0, gamma=1), res([0.982] * 20, rotate=0.0, gamma=1), res([0.99] * 20, amp="bf16")]
    folders = [hand_made(tmp_path / str(number), **spec) for number, spec in enumerate(specs)]

    def cells(*folders):
        return [[cell.split(" (")[0] for cell in list(row.values())[1:]] for row in claims.as_coded(read_runs(*folders))]
    assert cells(*folders) == [["98.06 %", "98.00 %", "97.50 %"], ["98.70 %", "99.00 %", "98.20 %"], ["96.28 %", "98.70 %", "96.27 %"]]
    assert cells(*folders[:2]) == [["98.06 %", "98.00 %", "97.50 %"], ["98.70 %", none, none], ["96.28 %", none, none]]
    assert cells(folders[1])[0] == ["98.06 %", none, "97.50 %"]  # is not as the text
    assert list(claims.as_coded(read_runs(*folders[:2]))[0].values())[2:] == [
        "98.00 % (20 epochs)", "97.50 % (10 epochs, batch-size 128, gamma 1)"]


def test_results_row_by_hand(tmp_path):
    run, = read_runs(hand_made(tmp_path / "run", accuracies=[0.95, 0.9712], lr=0.002, world_size=4))
    row = report.results_row([run], [run])
    assert list(row.values())[:-1] == [
        "AlexCapsNet, 4 processes", "lr 0.002", "1", "97.12 %", 2, "2,683,840", "10,588,416", "100", "600",
        "1,024 MiB", "0.99900", 4, "cpu, 1 threads"]
    table = report.markdown([{"a": 1, "b": None}, {"a": 2, "b": "x"}])
    assert table == "| a | b |\n| --- | --- |\n| 1 | – |\n| 2 | x |"


def test_damaged_run_folders_are_read_as_far_as_they_go(trained, tmp_path):
    def damaged(name, **files):
        shutil.copytree(trained, tmp_path / name)
        for file, content in files.items():
            path = next((tmp_path / name).glob(f"{file}.*"))
            path.unlink() if content is None else path.write_text(content)
        return read_runs(tmp_path / name)[0]

    whole, = read_runs(trained)
    assert whole.missing == [] and whole.model and len(whole.rows) == 2 and whole.title == "AlexCapsNet, 1 process, mnist5k"
    run = damaged("unfinished", summary=None)
    assert run.missing == ["summary.json is not there"] and "unfinished" in run.title
    assert run.facts["test_accuracy"] == whole.facts["test_accuracy"] and run.rows == whole.rows
    assert report.results_row([run], [run])["processes"] is None
    assert report.test_again(run, "nowhere", torch.device("cpu"))[3]["test_accuracy"] == whole.facts["test_accuracy"]
    assert len(run.missing) == 1
    run.facts["test_accuracy"] -= 0.1
    report.test_again(run, "nowhere", torch.device("cpu"))
    assert "not the run's" in run.missing[1]
    run = damaged("no rows", metrics="epoch,train_loss\n1,x\n")
    assert run.rows == whole.rows and "metrics.csv is damaged" in run.missing[0]  # last.pt has them too
    run = damaged("no model", last="not a checkpoint")
    assert run.model is None and "last.pt is damaged" in run.missing[0] and run.facts == whole.facts
    for number, change in enumerate(({"test_accuracy": "high"}, {"model": "lenet"}, {"confusion": [[1], [1, 2]]}, {"lr": None},
                                      {"traits": {"classes": ["0"], "image": [1, 28, 28]}}, {"traits": None, "dataset": "of an earlier day"},
                                      {"traits": {}})):
        facts = {k: v for k, v in (whole.facts | change).items() if v is not None}
        run = damaged(f"summary {number}", summary=json.dumps(facts))
        assert "summary.json is damaged" in run.missing[0] and "world_size" not in run.facts
    for key in ("epochs", "device", "world_size", "seed", "amp"):
        run = damaged(f"null {key}", summary=json.dumps(whole.facts | {key: None}))
        assert f"summary.json is damaged: {key}: null" in run.missing[0] and "world_size" not in run.facts
    assert damaged("header", metrics=",".join(caps.COLUMNS)).rows == whole.rows
    assert "damaged" in damaged("half", summary='{"model": "alex').missing[0]
    header = (trained / "metrics.csv").read_text().splitlines()[:2]
    assert "2 epochs, metrics.csv of 1" in damaged("short", metrics="\n".join(header)).missing[0]
    run = damaged("empty", last=None, summary=None, metrics=None)
    assert run.facts == {} and len(run.missing) == 3


def test_report(trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, tmp_path / "runs" / "whole")
    shutil.copytree(trained, tmp_path / "runs" / "seed-2")
    checkpoint = torch.load(trained / "last.pt", weights_only=True)
    checkpoint["config"]["seed"] = 2
    torch.save(checkpoint, tmp_path / "runs/seed-2/last.pt")
    facts = json.loads((trained / "summary.json").read_text())
    results.write_json(tmp_path / "runs/seed-2/summary.json", facts | {"seed": 2})
    hand_made(tmp_path / "runs" / "text", "rescaps", [0.9, 0.9812])
    (tmp_path / "runs" / "damaged").mkdir()
    (tmp_path / "runs" / "damaged" / "last.pt").write_text("no checkpoint")
    shown = {"orientation": [], "class_scores": []}
    # All images are rotated for the fit, for each seed of the setting; none is evaluated twice, nor distorted for two seeds.
    for module, name in (report, "orientation"), (report, "class_scores"), (probes, "class_scores"):
        monkeypatch.setattr(module, name, lambda model, x, *more, f=getattr(module, name), n=shown[name]: n.append(
            len(x)) or f(model, x, *more))
    assert caps.main(["report", "--images", "60"]) == 0
    assert shown["orientation"] == 2 * [1000] and shown["class_scores"] == 2 * [1000] + 17 * [59]
    said = capsys.readouterr().err
    page = (tmp_path / "report/report.md").read_text()
    assert f"| {100 * facts['test_accuracy']:.2f} ± 0.00 % |" in page and "| 98.12 % |" in page and "16 numbers of the winning capsule" in page
    for line in ("`runs/damaged`: last.pt is damaged", "`runs/text`: last.pt is not there"):
        assert line in page and line.replace("`", "") in said
    assert page.count("\n![") == 7 and "Not drawn" not in page
    for name in ("curves", "confusion", "roc", "orientation", "robustness", "diagram-alexcaps", "diagram-rescaps"):
        with Image.open(tmp_path / f"report/{name}.png") as picture:
            assert picture.width > 400
    assert sum(path.stat().st_size for path in (tmp_path / "report").iterdir()) < 2**20
    assert caps.main(["report", "runs/text"]) == 0
    assert not (tmp_path / "report/roc.png").exists()  # no picture stays that is not of these runs
    assert (tmp_path / "report/report.md").read_text().count("Not drawn") == 3
    refused(command("report", "runs/damaged", "nowhere", cwd=tmp_path), "runs/damaged", "last.pt", "nowhere")


def test_data_that_are_gone_are_named(trained, tmp_path, monkeypatch, capsys):
    no_download(monkeypatch)
    shutil.copytree(trained, tmp_path / "run")
    checkpoint = torch.load(trained / "last.pt", weights_only=True)
    checkpoint["config"]["dataset"] = "mnist"
    torch.save(checkpoint, tmp_path / "run/last.pt")
    results.write_json(tmp_path / "run/summary.json", json.loads((trained / "summary.json").read_text()) | {"dataset": "mnist"})
    assert caps.main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "r"), "--data-dir", str(tmp_path)]) == 0
    assert "without ROC" in capsys.readouterr().err and "curves.png" in (tmp_path / "r/report.md").read_text()
