"""Image files to digits, and the picture that explains a prediction."""
import json
from pathlib import Path

import numpy as np
import torch
from common import CAPS, command
from PIL import Image

import caps
from caps.extras import runs


def test_networks_that_come_along(embedded, tmp_path):
    """On a fresh clone: digits that they were trained on or not, each with its own summary, in files of 5 MB."""
    for image, label in zip(embedded.test_images[::100, 0], embedded.test_labels[::100]):
        Image.fromarray(255 - image.numpy()).resize((200, 200)).save(tmp_path / f"{len(list(tmp_path.iterdir()))}-{label}.png")
    for name, path in runs.NETWORKS.items():
        assert 4e6 < path.stat().st_size < 5.5e6
        done = command("eval", "--checkpoint", name, "--dataset", "mnist5k", "--out", f"e/{name}", cwd=tmp_path)
        assert done.returncode == 0 and "images are among MNIST's for training" in done.stdout, done.stderr
        facts = json.loads((tmp_path / f"e/{name}/summary.json").read_text())
        assert facts["model"] == name and facts["holdout"] == 0 and facts["test_accuracy"] > 0.985
    result = command("predict", "*.png", Path(CAPS).parent / "docs/postcode.jpg", cwd=tmp_path)
    *lines, postcode = result.stdout.splitlines()
    assert result.returncode == 0 and len(lines) == 10 and "postcode.jpg: 72104 " in postcode, result.stderr
    assert all(line.split(".png: ")[1][0] == line.split("-")[1][0] for line in lines)
    assert "network alexcaps, which comes along" in result.stderr


def test_predict(trained, embedded, tmp_path):
    folder = tmp_path / "digits"
    folder.mkdir()
    scores = caps.class_scores(caps.load_model(caps.read_checkpoint(trained / "last.pt"), torch.device("cpu")),
                               embedded.test_images, caps.World(0, 1, torch.device("cpu")))
    sure = scores.argmax(0)  # the image with the longest capsule of each class
    for digit in (0, 1):
        picture = Image.fromarray(embedded.test_images[sure[digit], 0].numpy())
        picture.save(folder / f"{digit}.png")
        Image.fromarray(255 - np.asarray(picture)).resize((200, 200)).save(folder / f"{digit}-inverted.jpg")
    (folder / "broken.png").write_bytes(b"no image")
    result = command("predict", "--checkpoint", trained / "last.pt", folder / "0.png", folder / "1.png", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    for digit, line in enumerate(result.stdout.splitlines()):
        assert line.startswith(f"{folder}/{digit}.png: {digit}  lengths {digit} (") and line.count("(") >= 3
    result = command("predict", "--checkpoint", trained / "last.pt", folder, "missing.png", cwd=tmp_path)
    assert result.returncode == 1 and len(result.stdout.splitlines()) == 4
    assert "broken.png: cannot be read" in result.stderr and "missing.png: cannot be read" in result.stderr
    result = command("predict", "--checkpoint", trained / "last.pt", "--invert", "digits/*.jpg", cwd=tmp_path)
    assert [line.split(": ")[1][0] for line in result.stdout.splitlines()] == ["0", "1"]


def test_predict_explains(trained, embedded, tmp_path):
    Image.fromarray(embedded.test_images[0, 0].numpy()).save(tmp_path / "digit.png")
    result = command("predict", "--checkpoint", trained / "last.pt", "digit.png", "--explain", "why", cwd=tmp_path)
    assert result.returncode == 0 and Image.open(tmp_path / "why/digit.png-routing.png").size[0] > 800, result.stderr
    votes, trace = torch.randn(2, 30, 5, 4, dtype=torch.float64), []
    v = caps._routing(votes, 3, trace)
    assert len(trace) == 3 and trace[-1][1] is v and (trace[0][0] == 0.2).all()
    for c, after in trace:
        torch.testing.assert_close(c.sum(2), torch.ones(2, 30, dtype=torch.float64))
        torch.testing.assert_close(after, caps.squash(torch.einsum("bnj,bnjd->bjd", c, votes), backend="torch"))
    assert not torch.allclose(trace[1][0], trace[0][0])


def test_boxes_and_json_and_what_was_seen(trained, embedded, tmp_path):
    for number in (0, 1):
        Image.fromarray(255 - embedded.test_images[number, 0].numpy()).resize((90, 90)).save(tmp_path / f"{number}.png")
    row = Image.new("L", (300, 120), 255)
    for number in (0, 1):
        row.paste(Image.open(tmp_path / f"{number}.png"), (20 + 130 * number, 15))
    row.save(tmp_path / "row.png")
    Image.new("L", (60, 80), 200).save(tmp_path / "blank.png")
    words = ("predict", "--checkpoint", trained / "last.pt", "blank.png", "0.png", "row.png", "missing.png")
    result = command(*words, "--json", "--show", "seen", cwd=tmp_path)
    assert result.returncode == 1 and result.stderr.count("missing.png") == 1, result.stderr
    assert "caps: --show: drawn in seen/" in result.stderr
    blank, one, two = json.loads(result.stdout)
    assert blank["result"] == "blank" and blank["digits"] == [] and blank["size"] == [60, 80]
    assert one["file"] == "0.png" and one["result"] == "digit" and len(one["digits"][0]["lengths"]) == 10
    assert [digit["box"][0] // 150 for digit in two["digits"]] == [0, 1]
    widths = [Image.open(tmp_path / f"seen/{name}.png-seen.png").width for name in ("blank", "0", "row")]
    assert widths == [550, 550, 825]  # a column a digit
    result = command("predict", "--checkpoint", trained / "last.pt", "blank.png", "--explain", "routed/", cwd=tmp_path)
    assert result.returncode == 0 and "drawn" not in result.stderr and not list((tmp_path / "routed").glob("*"))
    result = command("predict", "--checkpoint", trained / "last.pt", "0.png", "--explain", "routed/", cwd=tmp_path)
    assert result.returncode == 0 and "caps: --explain: drawn in routed/\n" in result.stderr
    result = command(*words[:-1], "--digits", cwd=tmp_path)
    lines = result.stdout.splitlines()
    assert result.returncode == 0 and len(lines) == 4 and lines[0] == "blank.png: blank: nothing is drawn on it"
    assert all(f"{line.split(': ')[0]}".endswith("]") for line in lines[1:])


def test_what_cannot_be_read_is_a_line_and_the_rest_goes_on(trained, embedded, tmp_path):
    Image.new("1", (20000, 10000)).save(tmp_path / "a.png")  # a bomb: 200 million pixels in 25 kB
    Image.new("1", (12000, 11000)).save(tmp_path / "b.png")
    Image.new("L", (1, 1)).save(tmp_path / "c.png")
    whole = tmp_path / "whole.jpg"
    Image.fromarray(embedded.test_images[0, 0].numpy()).resize((300, 300)).save(whole)
    (tmp_path / "d.jpg").write_bytes(whole.read_bytes()[:2000])
    pages = [Image.fromarray(embedded.test_images[i, 0].numpy()).resize((80, 80)) for i in (0, 1)]
    pages[0].save(tmp_path / "e.tif", save_all=True, append_images=pages[1:])
    result = command("predict", "--checkpoint", trained / "last.pt", tmp_path, cwd=tmp_path)
    errors = [line for line in result.stderr.splitlines() if "native backend" not in line]
    assert result.returncode == 1 and len(errors) == 4, errors
    assert all("cannot be read" in line and name in line for line, name in zip(errors, ("a.png", "b.png", "d.jpg")))
    assert "million" in errors[1] and "first of its 2 pages" in errors[3]
    lines = result.stdout.splitlines()
    assert len(lines) == 3 and lines[0].endswith("c.png: no digit: too few pixels") and lines[1].split(": ")[1][0].isdigit()


def test_names_of_drawings(trained, embedded, tmp_path):
    """No name of a file breaks its title, and no two files' drawings are one."""
    (tmp_path / "a").mkdir()
    for name in ("a/x.png", "a_x.png", "c$b^^{$.png"):
        Image.fromarray(embedded.test_images[0, 0].numpy()).save(tmp_path / name)
    result = command("predict", "--checkpoint", trained / "last.pt", "a/x.png", "a_x.png", "c$b^^{$.png", "--show", "seen",
                     cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert sorted(path.name for path in (tmp_path / "seen").iterdir()) == [
        "a_x.png-2-seen.png", "a_x.png-seen.png", "c$b^^{$.png-seen.png"]
