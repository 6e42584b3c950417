"""The paper's formulas once more, in float64 numpy and plain loops over pixels, and small batches
to try them on. Written from the formulas alone; shares no code with `jobs.losses`."""

from __future__ import annotations

import numpy as np
import torch

from data_prep.settings import VOID

SMOOTHING, EPSILON = 1.0, 1e-5


def a_batch(seed=0, images=3, num_classes=4, size=(5, 6), void=0.2, dtype=torch.float64):
    """Random logits [B, C, H, W] and target [B, H, W], of which a fifth is void."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, num_classes, *size, generator=generator, dtype=torch.float64)
    target = torch.randint(num_classes, (images, *size), generator=generator)
    target[torch.rand(images, *size, generator=generator) < void] = VOID
    return logits.to(dtype), target


def labelled_pixels(logits, target):
    """For each image the list of (softmax scores, label) of its pixels that are not void."""
    images = []
    for scores, labels in zip(np.asarray(logits, np.float64), np.asarray(target), strict=True):
        pixels = []
        for y, x in np.ndindex(labels.shape):
            if labels[y, x] != VOID:
                exponentials = np.exp(scores[:, y, x] - scores[:, y, x].max())
                pixels.append((exponentials / exponentials.sum(), int(labels[y, x])))
        images.append(pixels)
    return images


def cross_entropy(logits, target, weights):
    """-w_c log p of the true class, divided by the sum of the weights of the pixels' classes."""
    return _weighted_mean(logits, target, weights, lambda p: -np.log(p))


def focal(logits, target, weights, gamma=2.0):
    """(1 - p)^gamma times the cross entropy."""
    return _weighted_mean(logits, target, weights, lambda p: (1 - p) ** gamma * -np.log(p))


def _weighted_mean(logits, target, weights, of_pixel):
    total = weight = 0.0
    for pixels in labelled_pixels(logits, target):
        for p, label in pixels:
            total += weights[label] * of_pixel(p[label])
            weight += weights[label]
    return total / weight


def dice(logits, target, weights):
    """1 - 2 (sum_c w_c sum p g + s) / (sum_c w_c sum (g^2 + p^2) + s + eps), mean over images."""
    values = []
    for pixels in labelled_pixels(logits, target):
        above, below = SMOOTHING, SMOOTHING + EPSILON
        for p, label in pixels:
            for c, weight in enumerate(weights):
                g = 1.0 if c == label else 0.0
                above += weight * p[c] * g
                below += weight * (g**2 + p[c] ** 2)
        values.append(1 - 2 * above / below)
    return sum(values) / len(values)


def tversky(logits, target, weights, alpha=0.3, beta=0.7):
    """1 - (TP + 1) / (TP + alpha FP + beta FN + 1) of each class, the weighted mean over classes,
    mean over images."""
    values = []
    for pixels in labelled_pixels(logits, target):
        of_classes = []
        for c in range(len(weights)):
            hits = false_alarms = misses = 0.0
            for p, label in pixels:
                if c == label:
                    hits += p[c]
                    misses += 1 - p[c]
                else:
                    false_alarms += p[c]
            below = hits + alpha * false_alarms + beta * misses + SMOOTHING
            of_classes.append(1 - (hits + SMOOTHING) / below)
        values.append(np.average(of_classes, weights=weights))
    return sum(values) / len(values)


def max_pooled(losses, p=1.3, share=0.1):
    """sum w l with the weights that make it largest: sort, and try every number of capped ones."""
    q = p / (p - 1)
    ordered = np.sort(np.asarray(losses, np.float64))[::-1]
    n = len(ordered)
    m = share * n
    tau = n ** (-1 / q) * m ** (-1 / p)
    for capped in range(int(m) + 1):
        rest = ordered[capped:]
        if capped == m or not rest.any():
            return tau * ordered[:capped].sum()
        alpha = (np.sum((rest / rest[0]) ** q) / (m - capped)) ** (1 / q) * rest[0]
        if rest[0] <= alpha:
            return tau * (ordered[:capped].sum() + ((rest / alpha) ** (q - 1) * rest).sum())
    return tau * ordered[: int(m)].sum()


def pooled_cross_entropy(logits, target, weights, p=1.3, share=0.1):
    return _pooled(logits, target, weights, lambda true: -np.log(true), p, share)


def pooled_focal(logits, target, weights, gamma=2.0, p=1.3, share=0.1):
    return _pooled(
        logits, target, weights, lambda true: (1 - true) ** gamma * -np.log(true), p, share
    )


def _pooled(logits, target, weights, of_pixel, norm, share):
    pixels = [pixel for image in labelled_pixels(logits, target) for pixel in image]
    weight = np.array([weights[label] for _, label in pixels])
    losses = np.array([of_pixel(p[label]) for p, label in pixels])
    return max_pooled(losses * weight / weight.mean(), norm, share)


TERMS = {
    "CE": cross_entropy,
    "CEMP": pooled_cross_entropy,
    "DL": dice,
    "FL": focal,
    "FLMP": pooled_focal,
    "TL": tversky,
}


def single(name, logits, target, weights):
    """The loss of one term of the paper's names: `CE`, `WDL`, `FL[1]`, ..."""
    kind, _, numbers = name.removeprefix("W").rstrip("]").partition("[")
    weights = weights if name.startswith("W") else np.ones(len(weights))
    return TERMS[kind](logits, target, weights, *(float(n) for n in numbers.split(",") if n))


def naive_ramp(i, total):
    """Weight of the second loss at step i: clip((i - s) / (e - s), 0, 1), s = 30 %, e = 90 %."""
    start, end = 0.3 * total, 0.9 * total
    return min(max((i - start) / (end - start), 0.0), 1.0)


def alternating_ramp(i, total):
    """clip(1 - i/s, 0, 1) + 1 - cos(pi/2 clip((i - s) / (e - s), 0, 1)), s = 50 %, e = 90 %."""
    start, end = 0.5 * total, 0.9 * total
    falling = min(max(1 - i / start, 0.0), 1.0)
    return falling + 1 - np.cos(np.pi / 2 * min(max((i - start) / (end - start), 0.0), 1.0))


def numeric_gradient(function, logits, step=1e-5):
    """Central differences of `function` in every logit."""
    logits = np.asarray(logits).astype(np.float64)
    gradient = np.zeros_like(logits)
    for place in np.ndindex(logits.shape):
        above, below = logits.copy(), logits.copy()
        above[place] += step
        below[place] -= step
        gradient[place] = (function(above) - function(below)) / (2 * step)
    return gradient
