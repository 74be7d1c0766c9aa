"""The decoder: what it computes, its loss, its share in runs of every kind, its pictures, and the doubt it gives."""
import json

import numpy as np
import pytest
import torch
from common import command, start
from PIL import Image
from scipy import stats

import caps
from caps.extras import compare, decoding, predict, reconstructions, runs, summary

COLOURED = {"image": (3, 20, 26), "num_classes": 4}


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """The folder of a two-epoch run with a decoder on the embedded images."""
    cwd = tmp_path_factory.mktemp("decoded")
    result = command("--decoder", "--epochs", 2, "--dataset", "mnist5k", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return cwd / "runs" / "alexcaps-mnist5k"


def load(folder):
    return caps.load_model(caps.read_checkpoint(folder / "last.pt"), torch.device("cpu")).eval()


# ------------------------------------------------------------------------------------------------------------ the layers

@pytest.mark.parametrize("model", [caps.AlexCapsNet, caps.ResCapsNet])
def test_the_capsule_of_the_label_alone_is_decoded(model):
    torch.manual_seed(0)
    net = model(decoder=True, mean=[0.5], deviation=[0.2], **COLOURED) if model is caps.AlexCapsNet else model(
        decoder=True, **COLOURED)
    net.eval()
    images, labels = torch.rand(5, 3, 20, 26), torch.tensor([0, 1, 2, 3, 1])
    digits, made = net(images, labels)
    assert torch.equal(digits, net(images)) and made.shape == images.shape and 0 < made.min() < made.max() < 1
    w = [p.double() for p in net.decoder.parameters()]
    for i, label in enumerate(labels):
        x = torch.zeros(4, 16, dtype=torch.float64)
        x[label] = digits[i, label].double()
        x = x.flatten()
        for weight, bias in (w[:2], w[2:4]):
            x = (weight @ x + bias).clamp(min=0)
        expected = 1 / (1 + (-(w[4] @ x + w[5])).exp())
        torch.testing.assert_close(made[i].double(), expected.view(3, 20, 26), rtol=1e-5, atol=1e-6)
    assert [len(bias) for bias in w[1::2]] == [512, 1024, 3 * 20 * 26]
    longest = net.decoder(digits)
    torch.testing.assert_close(longest, net.decoder(digits, caps.lengths(digits).argmax(1)))
    capsules = digits.detach().requires_grad_()
    net.decoder(capsules, labels).sum().backward()
    others = torch.nn.functional.one_hot(labels, 4) == 0
    assert not capsules.grad[others].any() and capsules.grad[~others].abs().sum(1).min() > 0


@pytest.mark.parametrize("model", [caps.AlexCapsNet, caps.ResCapsNet])
def test_without_and_with_a_decoder_the_others_begin_alike(model):
    nets = []
    for decoder in (False, True):
        torch.manual_seed(3)
        nets.append(model(decoder=decoder).state_dict())
    without, having = nets
    assert not any("decoder" in key for key in without)
    assert all(torch.equal(value, having[key]) for key, value in without.items())
    assert {key for key in having if key not in without} == {
        f"decoder.layers.{i}.{what}" for i in (0, 2, 4) for what in ("weight", "bias")}


def test_squared_errors_are_sums_over_an_image():
    images, made = torch.rand(3, 2, 4, 5), torch.rand(3, 2, 4, 5).half()
    expected = [((made[i].float() - images[i]) ** 2).sum() for i in range(3)]
    torch.testing.assert_close(caps.squared_errors(made, images), torch.stack(expected))
    distances = decoding.distances(made.float(), images)
    torch.testing.assert_close(distances, torch.stack([e / (x ** 2).sum().sqrt() for e, x in zip(expected, images)]))
    with pytest.raises(ValueError, match=r"decoded has shape \[3, 2, 4, 5\], images \[3, 4, 5\]: expected the same"):
        caps.squared_errors(made, images[:, 0])
    dark = decoding.distances(torch.full((2, 1, 28, 28), 1e-3), torch.stack([torch.zeros(1, 28, 28), torch.full((1, 28, 28), 1 / 255)]))
    assert dark.max() < 0.01  # a sigmoid is never 0


# -------------------------------------------------------------------------------------------------------------- training

def test_a_step_descends_both_losses(small, tmp_path):
    """By hand: the margin loss and 0.01 times the squared errors to the images as they were moved; in two micro-steps."""
    run = start(small, tmp_path, "--decoder", "0.01", "--batch-size", "4", "--accumulate", "2")
    run.optimizer = torch.optim.SGD(run.model.parameters(), lr=1.0)
    before = {k: v.clone() for k, v in run.model.named_parameters()}
    index, motion = torch.arange(8), torch.linspace(-0.1, 0.1, 8)[:, None] * torch.tensor([1.0, 0, 0])
    images, labels = caps.move(caps.to_float(run.data.train_images[:8]), motion), run.data.train_labels[:8]
    digits = run.model(images)
    made = run.model.decoder(digits, labels)
    errors = (made - images).square().sum((1, 2, 3))
    margin = caps.margin_loss(caps.lengths(digits), labels)
    gradients = torch.autograd.grad(margin + 0.01 * errors.mean(), list(run.model.parameters()))
    caps.update_weights(run, index, motion, 8)
    for (name, after), gradient in zip(run.model.named_parameters(), gradients):
        torch.testing.assert_close(before[name] - after, gradient, rtol=1e-3, atol=2e-6, msg=name)
    torch.testing.assert_close(run.totals[[0, 2]].float(), torch.stack([8 * margin, errors.sum()]).detach())


def test_what_a_run_with_a_decoder_leaves(decoded):
    rows = caps.read_checkpoint(decoded / "last.pt")["history"]
    assert rows[1]["train_squared_error"] < rows[0]["train_squared_error"] < 784 / 4
    assert (decoded / "metrics.csv").read_text().splitlines()[0].split(",") == [*caps.COLUMNS, "train_squared_error",
                                                                                "usual_distance"]
    facts = json.loads((decoded / "summary.json").read_text())
    model, images = load(decoded), caps.to_float(caps.load_data("mnist5k").test_images)
    errors = caps.squared_errors(decoding.decode(model, images)[1], images)
    assert facts["test_squared_error"] == pytest.approx(errors.mean().item(), rel=1e-4)
    assert facts["decoder"] == 0.0005 and facts["parameters"] == 2_683_840 + 1_411_344
    for name in ("reconstructions", "dimensions"):
        with Image.open(decoded / f"{name}.png") as picture:
            assert picture.width > 1000
            picture.verify()


def test_the_usual_distance_is_that_of_99_in_100_training_images(small, tmp_path):
    run = start(small, tmp_path, "--decoder")
    usual = decoding.usual_distance(run)
    order, motion = run.plan(0)
    images = caps.move(caps.to_float(run.data.train_images[order]), motion)
    made = decoding.decode(run.model.eval(), images)[1]
    found = sorted(decoding.distances(made, images).tolist())
    assert found[int(0.99 * 319)] - 1e-4 <= usual <= found[int(0.99 * 319) + 1] + 1e-4


def test_half_and_half_is_the_whole_with_a_decoder(small, tmp_path):
    words = ["--dataset", "mnist", "--data-dir", small, "--ema", "0.99", "--decoder", "0.002"]
    assert command("--epochs", 2, "--out", "whole", *words, cwd=tmp_path).returncode == 0
    assert command("--epochs", 1, "--out", "halves", *words, cwd=tmp_path).returncode == 0
    assert command("--epochs", 2, "--out", "halves", "--resume", "--data-dir", small, cwd=tmp_path).returncode == 0
    whole, halves = (torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "halves"))
    for part in ("model", "average"):
        assert any("decoder" in key for key in whole[part])
        assert all(torch.equal(whole[part][k], halves[part][k]) for k in whole[part])
    for a, b in zip(whole["history"], halves["history"]):
        assert [a[k] for k in a if "sec" not in k] == [b[k] for k in b if "sec" not in k]
    result = command("--resume", "halves/last.pt", "--decoder", "--data-dir", small, cwd=tmp_path)
    assert result.returncode == 2 and "--decoder 0.0005: halves/last.pt was trained with 0.002" in result.stderr


# --------------------------------------------------------------------------------------------------------- what it is for

def test_a_decoder_is_summed_up_and_drawn(tmp_path):
    result = command("summary", "--decoder", cwd=tmp_path)
    assert "4,095,184" in result.stdout and "decoder.layers.4" in result.stdout and "802,816" in result.stdout
    rows = summary.layer_table(caps.AlexCapsNet(decoder=True, image=(1, 32, 32)))  # a stage of 1,024 units each
    assert [row[4] for row in rows if row[1] == "Linear"] == [160 * 512, 512 * 1024, 1024 * 1024]
    result = command("diagram", "--decoder", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    drawn = (tmp_path / "diagram-alexcaps.svg").read_text()
    for word in ("803,600", "525,312", "82,432", "Decoded image", "all but the longest", "Sigmoid"):
        assert f">{word}</text>" in drawn


def test_reconstructions_show_right_ones_and_errors_by_both_capsules(decoded, embedded, tmp_path, monkeypatch):
    model, images, labels = load(decoded), embedded.test_images, embedded.test_labels
    scores = caps.class_scores(model, images, caps.World(0, 1, torch.device("cpu")))
    drawn = []
    monkeypatch.setattr(reconstructions, "draw_row", lambda axes, name, images, titles: drawn.extend(zip(images, titles)))
    reconstructions.plot_results(model.eval(), images, scores, labels, embedded.traits["classes"], "t", tmp_path)
    titles = [title for _, title in drawn]
    assert titles[:10] == [str(c) for c in range(10)] and [t.split(":")[0] for t in titles[10:20]] == [str(c) for c in range(10)]
    predicted = scores.argmax(1)
    wrong = (predicted != labels).nonzero().flatten()
    assert len(titles) == 50 and torch.equal(drawn[20][0], caps.to_float(images[wrong[0]]))
    assert titles[30].startswith(f"{labels[wrong[0]]}: ") and titles[40].startswith(f"{predicted[wrong[0]]}: ")
    given = caps.to_float(images[wrong[:1]])
    torch.testing.assert_close(drawn[40][0], decoding.decode(model, given)[1][0], rtol=1e-4, atol=1e-5)
    assert titles[40].endswith(f": {((drawn[40][0] - given[0]) ** 2).sum():.0f}")


def test_eval_draws_and_leaves_no_picture_of_another_network(trained, decoded, main, tmp_path):
    assert main("eval", "--checkpoint", decoded, "--out", "e")[0] == 0
    ours, theirs = (json.loads((folder / "summary.json").read_text()) for folder in (tmp_path / "e", decoded))
    assert all(ours[key] == theirs[key] for key in ("test_accuracy", "test_loss", "confusion", "decoder"))
    assert all((tmp_path / "e" / name).read_bytes() == (decoded / name).read_bytes() for name in runs.DECODED_FILES)
    assert main("eval", "--checkpoint", trained, "--out", "e")[0] == 0
    assert not any((tmp_path / "e" / name).exists() for name in runs.DECODED_FILES)


def test_a_class_without_hits_does_not_take_the_place_of_others(embedded, tmp_path, monkeypatch):
    """20 classes, of which the last four are recognised."""
    torch.manual_seed(0)
    net, images = caps.AlexCapsNet(num_classes=20, decoder=True).eval(), embedded.test_images[:200]
    labels = torch.arange(200) % 20
    scores = torch.nn.functional.one_hot(torch.where(labels >= 16, labels, (labels + 1) % 16), 20).float()
    drawn = []
    monkeypatch.setattr(reconstructions, "draw_row", lambda axes, name, images, titles: drawn.append((name, titles)))
    reconstructions.plot_results(net, images, scores, labels, [str(c) for c in range(20)], "t", tmp_path)
    assert [name for name, _ in drawn] == ["image", "decoded", "image", "true capsule", "predicted capsule"]
    assert drawn[0][1] == ["16", "17", "18", "19"] and len(drawn[2][1]) == 10


def test_moved_dimensions_by_hand(decoded, embedded):
    model, image = load(decoded), caps.to_float(embedded.test_images[0])
    which, order, distances, made = decoding.move_dimensions(model, image)
    capsules, still = decoding.decode(model, image[None])
    assert which == caps.lengths(capsules)[0].argmax() and sorted(order) == list(range(16))
    assert distances == sorted(distances, reverse=True) and made.shape == (16, 11, 1, 28, 28)
    torch.testing.assert_close(made[:, 5], still.expand(16, -1, -1, -1))  # the middle step adds nothing
    for row, step in ((0, 0), (3, 10), (15, 8)):
        capsules = decoding.decode(model, image[None])[0]
        capsules[0, which, order[row]] += -0.25 + 0.05 * step
        torch.testing.assert_close(made[row, step], model.decoder(capsules, torch.tensor([which]))[0].detach(), rtol=1e-4, atol=1e-5)
    assert distances[0] == pytest.approx((made[0] - still).square().mean().sqrt().item(), rel=1e-4)


def test_pictures_of_coloured_sets_with_errors_alone_or_none(tmp_path):
    torch.manual_seed(0)
    net = caps.AlexCapsNet(decoder=True, mean=[0.5], deviation=[0.2], **COLOURED).eval()
    images = torch.randint(256, (6, 3, 20, 26), dtype=torch.uint8)
    predicted = caps.class_scores(net, images, caps.World(0, 1, torch.device("cpu")))
    net.eval()
    for name, labels in (("right", predicted.argmax(1)), ("wrong", (predicted.argmax(1) + 1) % 4)):
        (tmp_path / name).mkdir()
        reconstructions.plot_results(net, images, predicted, labels, ["a", "$b", "_c", "d d"], name, tmp_path / name)
        for file in ("reconstructions", "dimensions"):
            with Image.open(tmp_path / name / f"{file}.png") as picture:
                assert picture.width > 300


def test_what_is_decoded_to_something_else_is_doubted(decoded, tmp_path, embedded):
    """However long the capsule is; a checkpoint that tells no usual distance doubts nothing by it."""
    Image.fromarray(255 - embedded.test_images[501, 0].numpy()).resize((112, 112)).save(tmp_path / "five.png")
    checkpoint = torch.load(decoded / "last.pt", weights_only=True)
    found = {}
    for usual in (1e3, 1e-3):
        checkpoint["history"][-1]["usual_distance"] = usual
        torch.save(checkpoint, tmp_path / "last.pt")
        result = command("predict", "--checkpoint", "last.pt", "five.png", "--json", cwd=tmp_path)
        [found[usual]] = json.loads(result.stdout)
    assert 0 < found[1e3]["digits"][0]["distance"] == found[1e-3]["digits"][0]["distance"] < 30
    assert found[1e3]["digits"][0]["usual_distance"] == 1e3
    assert found[1e3]["digits"][0]["lengths"] == found[1e-3]["digits"][0]["lengths"]
    image = torch.ones(28, 28)
    lengths = torch.tensor([0.95] + 9 * [0.05])
    traits, far = checkpoint["traits"], predict.LIMITS["alexcaps"]
    near = far._replace(distance=5.0)
    assert predict.doubts(lengths, 4.0, traits, near) is None and predict.doubts(lengths, 6.0, traits, far) is None
    assert predict.doubts(lengths, 6.0, traits, near) == (
        "perhaps no digit, its reconstruction differs by 6.0, those of training images by 5.0 at most")
    assert predict.doubts(lengths * 0.5, 6.0, traits, near).startswith("perhaps no digit, no capsule")
    (lengths, distance), = predict.classify(load(decoded), [image.numpy()])
    made = decoding.decode(load(decoded), image[None, None])[1]
    assert distance == pytest.approx(((made - 1) ** 2).sum().item() / 28, rel=1e-4) and len(lengths) == 10


def test_explain_draws_what_was_decoded(decoded, tmp_path, embedded):
    Image.fromarray(255 - embedded.test_images[501, 0].numpy()).save(tmp_path / "five.png")
    result = command("predict", "--checkpoint", decoded / "last.pt", "five.png", "--explain", "out", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["five.png-decoded.png", "five.png-routing.png"]


def test_export_with_a_decoder(decoded, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    result = command("export", "--checkpoint", decoded / "last.pt", "model.onnx", cwd=tmp_path)
    assert result.returncode == 0 and "capsules, decoded; onnxruntime" in result.stdout, result.stderr
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    images = torch.rand(5, 1, 28, 28)
    made, = session.run(["decoded"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(made), decoding.decode(load(decoded), images)[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("words, said", [
    (["--decoder", "-1"], "--decoder: expected a number of at least 0, got '-1'"),
    (["--decoder", "much"], "--decoder: expected a number of at least 0, got 'much'"),
    (["summary", "--decoder", "--checkpoint", "last.pt"], "--decoder: the checkpoint tells it"),
])
def test_mistakes(main, words, said):
    status, line = main(*words)
    assert status == 2 and said in line


# ---------------------------------------------------------------------------------------------------- what it is found to do

class Run:
    """What compare reads of a run."""

    def __init__(self, seed, decoder, accuracy, r2, epochs=20, **facts):
        self.facts = dict.fromkeys(caps.RECIPE, 0) | {"model": "alexcaps", "dataset": "mnist", "seed": seed, "decoder": decoder,
                                                      "world_size": 1, "epochs": epochs, "traits": {"digest": "d"}} | facts
        self.departures = ["decoder 0.0005"]
        levels = {kind: [1, accuracy, accuracy - 0.1] for kind in ("rotation (degrees)", "shift (pixels)",
                                                                  "noise (standard deviation)")}
        self.knowledge = compare.knowledge(accuracy, np.array([r2, np.nan]), levels)


def test_runs_with_and_without_a_decoder_are_compared():
    runs = [Run(seed, decoder, 0.98 + 0.001 * seed, (0.6 if decoder else 0.3) + 0.01 * seed)
            for seed in (1, 2, 3) for decoder in (0, 5e-4)]
    runs += [Run(1, 0, 0.9, 0.1, epochs=2), Run(4, 5e-4, 0.9, 0.1, shift=2.0)]  # these have no like
    [pair] = compare.pairs(runs)
    assert [[run.facts["seed"] for run in kind] for kind in pair] == [[1, 2, 3]] * 2
    without, having = compare.rows(pair)
    assert without == {"runs": "AlexCapsNet, mnist, 20 epochs", "decoder's weight": None, "seeds": 3,
                       "test accuracy (%)": "98.20 ± 0.10", "R² of the angle": "0.320 ± 0.010",
                       "under rotation (%)": "93.20 ± 0.10", "under shift (%)": "93.20 ± 0.10", "under noise (%)": "93.20 ± 0.10"}
    assert having["R² of the angle"] == "0.620 ± 0.010"
    said = compare.verdict(pair)
    assert "with a decoder R² of the angle +0.300 (p = " in said and "not shown to differ: test accuracy +0.00 points (p = 1, corrected 1)" in said
    assert "no difference is shown" in compare.verdict((pair[0], pair[0]))
    assert "shows nothing" in compare.verdict((pair[0][:1], pair[1]))
    assert compare.rows((pair[0][:1], pair[1]))[0]["test accuracy (%)"] == "98.10"
    assert compare.groups(runs) == [runs[0:6:2], runs[1:6:2], runs[6:7], runs[7:]]
    again = Run(1, 0, 0.5, 0.5)
    assert compare.groups([again, *runs])[:2] == [[again, *runs[2:6:2]], [runs[0]]]  # another run of the same seed is shown too
    heavy = [Run(seed, 0.05, 0.5, 0.1) for seed in (1, 2)]
    light, heavy = compare.pairs(runs + heavy)  # a pair for each weight
    assert light == pair and [run.facts["decoder"] for run in heavy[1]] == [0.05, 0.05] and heavy[0] == pair[0]
    assert [row["decoder's weight"] for row in compare.rows(heavy)] == [None, "0.05"]


def test_chance_is_corrected_for_the_number_of_measures():
    a, b = [1.0, 2.0, 3.0], [2.5, 3.5, 4.6]
    p = stats.ttest_ind(a, b, equal_var=False).pvalue
    assert compare.p_value(a, b) == p and compare.p_value([1, 1], [1, 1]) == compare.p_value([1, 1], [2, 2]) == 1
    runs = [[Run(seed, weight, 0.9, 0.5) for seed in (1, 2, 3)] for weight in (0, 5e-4)]
    for kind, values in zip(runs, (a, b)):
        for run, value in zip(kind, values):
            run.knowledge = {"x": value, "R² of the angle": 100 * (kind is runs[1]) + value, "y": value}
    said = compare.verdict(runs)
    assert "with a decoder R² of the angle +101." in said
    assert f"not shown to differ: x +1.53 (p = {p:.2g}, corrected {2 * p:.2g}), y +1.53 (p = {p:.2g}, corrected {2 * p:.2g})" in said


def test_the_report_sets_runs_with_and_without_a_decoder_side_by_side(trained, decoded, main, tmp_path):
    assert main("report", trained, decoded, "--images", 60)[0] == 0
    page = (tmp_path / "report/report.md").read_text()
    accuracies = [json.loads((run / "summary.json").read_text())["test_accuracy"] for run in (trained, decoded)]
    for weight, accuracy in zip(("–", "0.0005"), accuracies):
        assert f"| AlexCapsNet, mnist5k, 2 epochs | {weight} | 1 | {100 * accuracy:.2f} |" in page
    assert "one seed with or without a decoder shows nothing" in page
    assert page.count("| 16 numbers of the winning capsule |") == 2
    assert main("report", trained)[0] == 0
    assert "Not measured: there are no finished runs with and without `--decoder`" in (tmp_path / "report/report.md").read_text()
