"""What a decoder makes of capsules: of the longest ones, of one with a dimension moved, and how far it is from the image."""

import torch

from caps import EVALUATION_BATCH, STATISTICS_IMAGES, autocast, lengths, move, progress, squared_errors, to_float

STEPS = torch.arange(-5, 6) / 20  # by which a dimension is moved: Sabour, Frosst and Hinton 2017, figure 4


@torch.no_grad()
def decode(model, images, which=None, amp="off"):
    """Images [B, C, H, W] in [0, 1] -> (digit capsules [B, J, D], what those of the classes `which` [B] are decoded to, by
    default the longest ones, float32 [B, C, H, W])."""
    with autocast(images.device, amp):
        capsules = model(images)
        return capsules, model.decoder(capsules, which).float()


def distances(decoded, images):
    """How far images [B, C, H, W] are from what was decoded of them: |x - r|² / max(|x|, 1) -> [B], >= 0. Over the norm,
    so that thick strokes are allowed more than thin ones; 1 is that of a single white pixel."""
    return squared_errors(decoded, images) / images.flatten(1).norm(dim=1).clamp(min=1)


def mean_squared_error(model, images, amp="off"):
    """The mean of `squared_errors` over uint8 images [n, C, H, W], decoded from their longest capsules."""
    errors = [squared_errors(decode(model, batch, amp=amp)[1], batch)
              for batch in map(to_float, progress("decoded", images.split(EVALUATION_BATCH)))]
    return torch.cat(errors).mean().item()


def usual_distance(run):
    """The distance that 99 % of a run's training images keep, over the first images of its first epoch as shown there:
    what is further off is not what the network knows (docs/measurements.md)."""
    order, motion = (part[:STATISTICS_IMAGES] for part in run.plan(0))
    run.tested.eval()
    found = []
    for part, motions in zip(order.split(EVALUATION_BATCH), motion.split(EVALUATION_BATCH)):
        images = move(to_float(run.data.train_images[part]), motions)
        found.append(distances(decode(run.tested, images, amp=run.args.amp)[1], images))
    run.tested.train()
    return torch.cat(found).quantile(0.99).item()


@torch.no_grad()
def move_dimensions(model, image, amp="off"):
    """The longest capsule of an image [C, H, W] in [0, 1] decoded with one dimension at a time moved by STEPS: (class,
    dimensions by how far they move the image, that distance, images [D, steps, C, H, W]). The distance is the root of
    the mean square over steps and pixels."""
    capsules, still = decode(model, image[None], amp=amp)
    which, dim, steps = lengths(capsules).argmax(1), capsules.shape[2], STEPS.to(image.device)
    moved = capsules.repeat(dim * len(steps), 1, 1)                                         # [D · steps, J, D]
    moved[:, which[0]] += (torch.eye(dim, device=image.device)[:, None] * steps[:, None]).flatten(0, 1)
    decoded = model.decoder(moved, which.expand(len(moved))).unflatten(0, (dim, -1))        # [D, steps, C, H, W]
    distance = (decoded - still).square().flatten(1).mean(1).sqrt()
    order = distance.argsort(descending=True)
    return which.item(), order.tolist(), distance[order].tolist(), decoded[order]
