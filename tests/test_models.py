"""Routing, layers, models and the loss: against numbers worked out by hand, and what users rely on."""
import math

import pytest
import torch

import caps
from caps.extras import summary


def test_squash_by_hand():
    # |(3, 4)| = 5 and 5 / (1 + 25) = 5/26
    torch.testing.assert_close(caps.squash(torch.tensor([3.0, 4.0])), torch.tensor([15 / 26, 20 / 26]))
    columns = caps.squash(torch.tensor([[3.0, 0.0], [4.0, 1.0]]), dim=0)
    torch.testing.assert_close(columns, torch.tensor([[15 / 26, 0.0], [20 / 26, 0.5]]))


def test_lengths_and_their_gradient_at_zero():
    capsules = torch.tensor([[[3.0, 4.0], [0.0, 0.0]]], requires_grad=True)
    found = caps.lengths(capsules)
    assert found.tolist() == [[5.0, 0.0]]
    found.sum().backward()
    torch.testing.assert_close(capsules.grad, torch.tensor([[[0.6, 0.8], [0.0, 0.0]]]))


def test_margin_loss_by_hand():
    # class 0 present: (0.9 - 0.5)² = 0.16; class 1 absent: 0.5 (0.3 - 0.1)² = 0.02; class 2: below the margin
    # second sample: (0.9 - 0.95)+ = 0 and 0.5 (0.6 - 0.1)² = 0.125
    scores = torch.tensor([[0.5, 0.3, 0.05], [0.6, 0.95, 0.0]])
    assert caps.margin_loss(scores, torch.tensor([0, 1])).item() == pytest.approx((0.18 + 0.125) / 2)
    assert caps.margin_loss(scores[:1], torch.tensor([0]), 0.8, 0.2, 1.0).item() == pytest.approx(0.09 + 0.01)


@pytest.mark.parametrize("backend", ["torch", "native"])
def test_routing_by_hand(backend):
    # One input capsule with votes (1, 0): t = 1: c = 1/2, s = 1/2, v = 0.25 / 1.25 = 0.2; b = (0.2, 0)
    # t = 2: c = e^0.2 / (e^0.2 + 1) = s, v = s² / (1 + s²)
    s = math.exp(0.2) / (math.exp(0.2) + 1)
    votes = torch.tensor([[[[1.0], [0.0]]]])
    for iterations, expected in ((1, 0.2), (2, s * s / (1 + s * s))):
        found = caps.routing(votes, iterations, backend=backend)
        torch.testing.assert_close(found, torch.tensor([[[expected], [0.0]]]))
    weight, inputs = torch.tensor([[[[2.0]], [[0.0]]]]), torch.tensor([[[0.5]]])  # W·u gives the same votes
    torch.testing.assert_close(caps.capsule_linear(inputs, weight, 2, backend=backend), found)


def test_one_output_capsule_needs_no_agreement():
    votes = torch.randn(2, 5, 1, 4)
    torch.testing.assert_close(caps.routing(votes, 3), caps.squash(votes.sum(1)))


def test_gradients_of_the_plain_version():
    votes = torch.randn(2, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    inputs = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 4, 5, dtype=torch.float64, requires_grad=True)
    for iterations in (1, 3):
        assert torch.autograd.gradcheck(lambda v: caps.routing(v, iterations, backend="torch"), votes)
        assert torch.autograd.gradcheck(lambda u, w: caps.capsule_linear(u, w, iterations, backend="torch"), (inputs, weight))


@pytest.mark.parametrize("model, parameters", [(caps.AlexCapsNet, 2_683_840), (caps.ResCapsNet, 2_022_272)])
def test_shapes_parameters_and_independent_samples(model, parameters):
    torch.manual_seed(0)
    net = model().eval()
    assert sum(p.numel() for p in net.parameters()) == parameters
    images = torch.rand(3, 1, 28, 28)
    digits = net(images)
    assert digits.shape == (3, 10, 16) and (caps.lengths(digits) < 1).all()
    for i in range(3):
        torch.testing.assert_close(net(images[i:i + 1])[0], digits[i], rtol=1e-4, atol=1e-6)
    assert model(num_classes=7)(images).shape == (3, 7, 16)


def test_layer_table_totals():
    rows = summary.layer_table(caps.AlexCapsNet())
    assert sum(row[3] for row in rows) == 2_683_840
    first = next(row for row in rows if row[1] == "PatchConv2d")
    assert first[2] == (64, 6, 6) and first[4] == 64 * 121 * 36
    assert rows[-1][2] == (10, 16) and rows[-1][4] == 128 * 10 * 16 * (8 + 3 + 2)


def test_pixels_permute_capsules():
    primary = caps.PrimaryCapsules(types=2, dim=3)
    maps = torch.randn(1, 6, 2, 2)
    order = torch.tensor([2, 0, 3, 1])
    permuted = maps.flatten(2)[:, :, order].view_as(maps)
    by_type = primary(maps).view(2, 4, 3)
    torch.testing.assert_close(primary(permuted).view(2, 4, 3), by_type[:, order])
    torch.testing.assert_close(by_type[1, 0] / by_type[1, 0].norm(), maps[0, 3:, 0, 0] / maps[0, 3:, 0, 0].norm())


@pytest.mark.parametrize("model", [caps.AlexCapsNet, caps.ResCapsNet])
def test_zero_input_has_finite_gradients(model):
    net = model()
    for parameter in net.parameters():
        torch.nn.init.zeros_(parameter)
    caps.margin_loss(caps.lengths(net(torch.zeros(2, 1, 28, 28))), torch.tensor([0, 1])).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in net.parameters())
