"""Image files to digits, and the picture that explains a prediction."""
import numpy as np
import torch
from common import command
from PIL import Image

import caps
from caps.extras import predict


def test_predict(trained, embedded, tmp_path):
    folder = tmp_path / "digits"
    folder.mkdir()
    scores = caps.class_scores(caps.load_model(caps.read_checkpoint(trained / "last.pt"), torch.device("cpu")),
                               embedded.test_images, caps.World(0, 1, torch.device("cpu")))
    sure = scores.argmax(0)  # the image with the longest capsule of each class
    for digit in (0, 1):
        picture = Image.fromarray(embedded.test_images[sure[digit]].numpy())
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
    Image.fromarray(embedded.test_images[0].numpy()).save(tmp_path / "digit.png")
    result = command("predict", "--checkpoint", trained / "last.pt", "digit.png", "--explain", "why", cwd=tmp_path)
    assert result.returncode == 0 and Image.open(tmp_path / "why/digit.png-routing.png").size[0] > 800, result.stderr
    votes, trace = torch.randn(2, 30, 5, 4, dtype=torch.float64), []
    v = caps._routing(votes, 3, trace)
    assert len(trace) == 3 and trace[-1][1] is v and (trace[0][0] == 0.2).all()
    for c, after in trace:
        torch.testing.assert_close(c.sum(2), torch.ones(2, 30, dtype=torch.float64))
        torch.testing.assert_close(after, caps.squash(torch.einsum("bnj,bnjd->bjd", c, votes), backend="torch"))
    assert not torch.allclose(trace[1][0], trace[0][0])


def test_a_digit_is_framed_as_in_mnist(tmp_path, embedded):
    Image.fromarray(embedded.test_images[0].numpy()).save(tmp_path / "as-it-is.png")
    torch.testing.assert_close(predict.read_digit(tmp_path / "as-it-is.png"), caps.to_float(embedded.test_images[:1])[0])
    ink = np.zeros((300, 500), np.uint16)
    ink[20:220, 30:80] = 65535
    Image.fromarray(ink).save(tmp_path / "bar.png")  # 16-bit, off centre
    bar = predict.read_digit(tmp_path / "bar.png")[0]
    rows, columns = bar.sum(1).nonzero().flatten(), bar.sum(0).nonzero().flatten()
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (4, 23, 11, 15) or (columns[0], columns[-1]) == (12, 16)
    clear = np.zeros((28, 28, 4), np.uint8)
    clear[10:20, 10:20, 3] = 255  # opaque black on a transparent ground
    Image.fromarray(clear).save(tmp_path / "clear.png")
    assert predict.read_digit(tmp_path / "clear.png", invert=True)[0, 15, 15] == 1
    blank = Image.new("L", (40, 40))
    blank.save(tmp_path / "blank.png")
    assert predict.read_digit(tmp_path / "blank.png").abs().max() == 0


def test_a_blank_image_is_uncertain(trained, tmp_path):
    Image.new("L", (28, 28), 255).save(tmp_path / "white.png")
    Image.new("L", (28, 28)).save(tmp_path / "black.png")
    result = command("predict", "--checkpoint", trained / "last.pt", tmp_path, cwd=tmp_path)
    assert result.returncode == 0 and "no capsule is longer than 0.5" in result.stdout
