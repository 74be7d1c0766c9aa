"""Pictures as people photograph, scan and draw them: what is found in them, and what a network makes of it."""
import numpy as np
import pytest
import torch
from bench_pictures import judged, saved
from PIL import Image, ImageDraw
from pictures import KINDS, NOTHING, grey, place

import caps
from caps.extras import datasets, predict, reading

MNIST = datasets.earlier_traits("mnist")
LIMITS = predict.LIMITS["alexcaps"]


@pytest.fixture(scope="module")
def digits(trained, embedded):
    """A network, and 20 images with their classes that it has right and is surest of, two a class."""
    model = caps.load_model(caps.read_checkpoint(trained / "last.pt"), torch.device("cpu")).eval()
    images = embedded.test_images[:, 0].numpy() / np.float32(255)
    scores = torch.stack([lengths for lengths, _ in predict.classify(model, list(images))])
    chosen = scores[range(len(scores)), embedded.test_labels].view(-1).sort(descending=True).indices
    chosen = [i for c in range(10) for i in chosen[embedded.test_labels[chosen] == c][:2].tolist()]
    assert (scores[chosen].argmax(1) == embedded.test_labels[chosen]).all()
    return model, images[chosen], embedded.test_labels[chosen].tolist()


def shown(model, image):
    """The class that a picture is read as, None where it is not read as one digit."""
    result = judged(model, saved(image), LIMITS)
    return result["digits"][0]["digit"] if result["result"] == "digit" else None


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_picture_is_read_as_its_digits_are(kind, digits):
    model, images, labels = digits
    generator = np.random.default_rng(1)
    right = sum(shown(model, KINDS[kind](image, generator)) == label for image, label in zip(images, labels))
    assert right >= 17, f"{right} of 20"


@pytest.mark.parametrize("kind", ["white page", "black page", "transparent page", "grey page with noise", "lit page",
                                  "blank sixteen bits", "uniform noise", "noise of 28 pixels", "coloured noise"])
def test_blank_pages_and_noise_hold_no_figure(kind):
    generator = np.random.default_rng(0)
    for _ in range(4):
        picture = reading.read_picture(saved(NOTHING[kind](generator)))
        assert not picture.figures and picture.remark in ("blank", "texture")


def test_photographs_of_other_things_and_textures_are_doubted(digits):
    generator = np.random.default_rng(0)
    for kind in ("face", "checkerboard", "clouds of ink"):
        accepted = 0
        for _ in range(10):
            result = judged(digits[0], saved(NOTHING[kind](generator)), LIMITS)
            accepted += result["result"].startswith("digit") and not result["uncertain"]
        assert accepted <= 3, kind


@pytest.mark.parametrize("mode, bits", [
    ("1", 1), ("L", 8), ("LA", 8), ("P", 8), ("PA", 8), ("RGB", 8), ("RGBA", 8), ("CMYK", 8), ("I", 8), ("I", 12), ("I", 16),
    ("I", 31), ("I;16", 8), ("I;16", 10), ("I;16", 12), ("I;16", 16), ("F", 0), ("F", 8)])
@pytest.mark.parametrize("dark", [False, True])
def test_every_mode_at_several_depths(mode, bits, dark, digits):
    model, images, labels = digits
    ink = place(images[9], np.random.default_rng(2), (200, 260), 170)
    ink = 1 - ink if dark else ink
    if mode == "I;16":
        image = Image.fromarray((ink * (2 ** bits - 1)).astype(np.uint16))
    elif mode in "IF":
        values = ink.astype(np.float64) * max(1, 2 ** bits - 1)
        image = Image.fromarray(values.astype(np.int32 if mode == "I" else np.float32))
    elif mode == "PA":
        image = grey(ink).convert("P").convert("PA")
    else:
        image = grey(ink).convert(mode)
    assert shown(model, image) == labels[9]


def test_a_28_pixel_image_is_taken_as_it_is(embedded):
    for image in embedded.test_images[::50, 0]:
        exact = caps.to_float(image).numpy()
        for dark in (False, True):
            picture = reading.read_picture(saved(Image.fromarray(255 - image.numpy() if dark else image.numpy())))
            np.testing.assert_allclose(picture.figures[0].image, exact, rtol=0, atol=1e-6 * dark)
    again = reading.read_picture(saved(Image.fromarray(embedded.test_images[0, 0].numpy()).convert("RGB")))
    np.testing.assert_allclose(again.figures[0].image, caps.to_float(embedded.test_images[:1])[0, 0].numpy(), atol=1e-6)


def test_thin_strokes_and_a_tall_one_stay():
    sheet = Image.new("L", (100, 260), 255)
    sheet.paste(0, (48, 30, 52, 230))  # a 1 of 4 × 200 pixels
    image = reading.read_picture(saved(sheet)).figures[0].image
    rows, columns = image.sum(1).nonzero()[0], image.sum(0).nonzero()[0]
    assert rows[0] in (4, 5) and rows[-1] - rows[0] == 19 and 2 <= len(columns) <= 4 and image.max() > 0.9
    sheet = Image.new("L", (1200, 1200), 255)
    ImageDraw.Draw(sheet).ellipse((200, 100, 900, 1100), outline=0, width=10)  # a pen of 1 % of the height
    ring = reading.read_picture(saved(sheet)).figures[0].image
    assert ring.max() > 0.9 and ring[14, 14] == 0 and (ring[14] > 0.5).sum() >= 4


def test_dirt_does_not_shrink_a_digit(digits):
    ink = place(digits[1][0], np.random.default_rng(0), (300, 300), 200)
    clean = reading.read_picture(saved(grey(1 - ink))).figures
    ink[3:7, 3:7] = 1
    dirty = reading.read_picture(saved(grey(1 - ink))).figures
    assert len(clean) == len(dirty) == 1 and clean[0].box == dirty[0].box
    np.testing.assert_allclose(clean[0].image, dirty[0].image, atol=0.1)


def test_colours_on_transparent_ground():
    for pen, alpha in ((0, 255), (255, 255), (120, 200)):
        sheet = Image.new("RGBA", (300, 300))
        ImageDraw.Draw(sheet).line((100, 50, 200, 250), (pen, pen, pen, alpha), 20)
        figures = reading.read_picture(saved(sheet)).figures
        assert len(figures) == 1 and figures[0].box == pytest.approx((92, 45, 208, 255), abs=8)


def test_boxes_are_those_of_the_upright_picture(tmp_path):
    sheet = Image.new("L", (2400, 1600), 255)
    sheet.paste(0, (1800, 400, 1860, 1000))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    sheet.save(tmp_path / "turned.jpg", exif=exif)
    picture = reading.read_picture(tmp_path / "turned.jpg")
    assert picture.size == (1600, 2400)
    assert picture.figures[0].box == pytest.approx((600, 1800, 1200, 1860), abs=8)


def test_several_digits_are_read_in_order(digits):
    model, images, labels = digits
    order = [0, 8, 15, 4, 11, 19]
    ones = [np.pad(images[i], 4) for i in order]
    sheet = np.vstack([np.hstack(ones[:4]), np.hstack([*ones[4:], 0 * ones[0], 0 * ones[0]])])
    big = np.asarray(Image.fromarray(sheet).resize((sheet.shape[1] * 5, sheet.shape[0] * 5), Image.Resampling.BICUBIC))
    for sheet in (1 - big, big, (0.9 - 0.7 * big) * np.linspace(0.5, 1, big.shape[1])):
        result = judged(model, saved(grey(sheet)), LIMITS)
        text = "".join(str(labels[i]) for i in order)
        assert result["result"] == "digits" and len(result["digits"]) == 6
        assert sum(digit["digit"] == int(true) for digit, true in zip(result["digits"], text)) >= 5, result["text"]
        assert [digit["row"] for digit in result["digits"]] == [0, 0, 0, 0, 1, 1]
        for number, digit in enumerate(result["digits"]):
            row, column = divmod(number, 4)
            left, top, right, bottom = digit["box"]
            assert 180 * column <= left < right <= 180 * (column + 1) and 180 * row <= top < bottom <= 180 * (row + 1)


def test_digits_in_the_boxes_of_a_form(digits):
    model, images, labels = digits
    sheet = np.zeros((260, 860), np.float32)
    for cell, i in enumerate((1, 6, 10, 16)):
        left = 30 + 200 * cell
        sheet[50:210, left + 20:left + 180] = np.asarray(Image.fromarray(images[i]).resize((160, 160)))
        sheet[30:230, left:left + 3] = sheet[30:230, left + 200:left + 203] = 1
        sheet[30:33, left:left + 203] = sheet[227:230, left:left + 203] = 1
    result = judged(model, saved(grey(1 - sheet)), LIMITS)
    assert len(result["digits"]) == 4 and result["result"] == "digits"


@pytest.mark.parametrize("longest, second, stroke, doubt", [
    (0.9, 0.1, 0.13, None), (0.5, 0.1, 0.13, "perhaps no digit"), (0.9, 0.8, 0.13, "3 or 8"),
    (0.9, 0.1, 0.6, "a blot")])
def test_what_is_doubted(longest, second, stroke, doubt):
    scores = torch.full((10,), 0.05)
    scores[3], scores[8] = longest, second
    figure = reading.Figure((10, 10, 40, 50), np.zeros((28, 28), np.float32), stroke)
    result = predict.judge(reading.Picture((60, 60), [figure]), [(scores, 0)], MNIST, LIMITS)
    assert result["result"] == "digit" and result["text"] == "3"
    assert result["uncertain"] is None if doubt is None else doubt in result["uncertain"]
    sure = torch.full((10,), 0.05).index_fill(0, torch.tensor(7), 0.9)
    other = reading.Figure((70, 10, 90, 50), figure.image, 0.1)
    both = predict.judge(reading.Picture((99, 60), [figure, other]), [(scores, 0), (sure, 0)], MNIST, LIMITS)
    assert (both["result"], both["text"]) == ("digits", "?7" if doubt else "37")


def test_limits_are_the_models_and_the_checkpoints():
    for model, limits in predict.LIMITS.items():
        content = {"config": {"model": model}, "history": [{"usual_distance": 3.0}, {}]}
        assert predict.limits_of(content) == limits and limits.distance == np.inf
        content["history"].append({"usual_distance": 4.0})
        assert predict.limits_of(content) == (*limits[:2], 4.0)


def test_not_a_number_in_a_float_image(digits):
    ink = 1 - place(digits[1][4], np.random.default_rng(0), (200, 200), 150)
    ink[0, 0] = np.nan
    ink[0, 1] = np.inf
    assert shown(digits[0], Image.fromarray(ink)) == digits[2][4]


@pytest.mark.parametrize("side", [16, 20, 32, 64])
def test_small_pictures_light_on_black(side, digits):
    model, images, labels = digits
    right = sum(shown(model, grey(np.asarray(Image.fromarray(image).resize((side, side))))) == label
                for image, label in zip(images, labels))
    assert right >= 16


def test_a_digit_cut_out_closely(digits):
    model, images, labels = digits
    right = 0
    for image, label in zip(images, labels):
        ink = np.asarray(Image.fromarray(image).resize((300, 300), Image.Resampling.BICUBIC)).clip(0, 1)
        rows, columns = (np.flatnonzero((ink > 0.3).any(axis)) for axis in (1, 0))
        part = ink[rows[0]:rows[-1] + 1, columns[0]:columns[-1] + 1]
        right += shown(model, grey(1 - part)) == label
    assert right >= 16, f"{right} of 20"


def test_a_long_stroke_is_no_ruled_line_and_ruled_lines_are_no_strokes():
    sheet = Image.new("L", (400, 400), 255)
    ImageDraw.Draw(sheet).line((200, 20, 205, 380), 0, 14)
    assert len(reading.read_picture(saved(sheet)).figures) == 1
    sheet = np.ones((300, 400), np.float32)
    sheet[40::60] = sheet[41::60] = 0.1
    assert not reading.read_picture(saved(grey(sheet))).figures


@pytest.mark.parametrize("stroke", [10, 16, 20])
def test_holes_of_block_digits_are_no_digits(stroke):
    sheet = Image.new("L", (160, 210))
    draw = ImageDraw.Draw(sheet)
    draw.rectangle((50, 50, 110, 160), fill=255)
    draw.rectangle((50 + stroke, 50 + stroke, 110 - stroke, 160 - stroke), fill=0)
    figures = reading.read_picture(saved(sheet)).figures
    assert len(figures) == 1 and figures[0].box == pytest.approx((50, 50, 111, 161), abs=3)
