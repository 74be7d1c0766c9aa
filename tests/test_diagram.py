"""The drawings of the networks: every layer is there, no label overlaps."""
import re

import pytest
import torch
from common import command
from PIL import Image

import caps
from caps.extras import diagram, summary


def texts(figure):
    """The lines of a figure and their boxes in pixels."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    renderer = FigureCanvasAgg(figure).get_renderer()
    return [(text.get_text(), text.get_window_extent(renderer)) for text in figure.axes[0].texts]


@pytest.mark.parametrize("model", list(caps.MODELS))
def test_the_diagram_tells_of_every_layer(model, tmp_path):
    result = command("diagram", "--model", model, "--iterations", 2, "--out", "d", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [f"d/diagram-{model}.svg", f"d/diagram-{model}.png"]
    with Image.open(tmp_path / "d" / f"diagram-{model}.png") as png:
        assert png.width > 1500
    assert (tmp_path / "d" / f"diagram-{model}.png").stat().st_size < 150_000
    words = re.findall(r"<text[^>]*>([^<]*)</text>", (tmp_path / "d" / f"diagram-{model}.svg").read_text())
    rows = summary.layer_table(caps.MODELS[model](iterations=2))
    assert {"×".join(map(str, row[2])) for row in rows} <= set(words) and "routing, 2 iterations" in words
    counts = [int(n.replace(",", "")) for word in words if re.fullmatch(r"[\d,]+( \+ [\d,]+)*", word)
              for n in word.split(" + ")]
    for count in {row[3] for row in rows} - {0}:
        assert counts.count(count) == sum(row[3] == count for row in rows), count
    totals = f"{sum(row[3] for row in rows):,} parameters, {sum(row[4] for row in rows):,} multiply-adds"
    assert any(totals in word for word in words)


def changed(change):
    """A model of which one layer is not as it was, or there are more of them."""
    if change == "classes":
        return caps.ResCapsNet(num_classes=47, iterations=1)
    model = caps.AlexCapsNet() if change == "convolution" else caps.ResCapsNet()
    model.backbone.insert(4, torch.nn.Conv2d(64, 64, (3, 1), padding=(1, 0)) if change == "convolution"
                          else caps.ResidualBlock(32))
    return model


@pytest.mark.parametrize("change, words", [
    ("convolution", {"Conv 3×1": 1, "12,352": 1}),
    ("block", {"Residual block": 4, "1,024 + 64": 4}),
    ("classes", {"46": 1, "47×16": 1, "7,796,736": 1, "routing, 1 iteration": 1, "⋮": 2}),
])
def test_a_changed_layer_changes_the_diagram(change, words, tmp_path):
    said = [text for text, _ in texts(diagram.plot_diagram(changed(change), tmp_path / "d.svg"))]
    assert {word: said.count(word) for word in words} == words


@pytest.mark.parametrize("model", [caps.AlexCapsNet, caps.ResCapsNet, lambda: changed("block"),
                                   lambda: changed("classes")])
def test_no_label_of_the_diagram_overlaps_or_is_cut(model, tmp_path):
    figure = diagram.plot_diagram(model(), tmp_path / "d.svg")
    boxes = texts(figure)
    for i, (text, box) in enumerate(boxes):
        assert 0 <= box.x0 and 0 <= box.y0 and box.x1 <= figure.bbox.x1 and box.y1 <= figure.bbox.y1, text
        assert not [other for other, around in boxes[:i] if box.overlaps(around)], text
