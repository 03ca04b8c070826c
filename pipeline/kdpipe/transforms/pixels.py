"""Operations on uint8 images, each row by itself, given every parameter: whole numbers throughout.

Whole numbers have no rounding to depend on: the batch, the number of threads and the device change no bit. Each result
is rounded once, to the nearest step, halves up. Weights of neighbours are multiples of 1/2048, factors and coordinates
of 1/65536. Shapes: B rows, H height, W width, C channels (1: grey, 3: red, green, blue), K taps.
"""

from __future__ import annotations

import torch
from torch import Tensor

WEIGHT = 2**11
"""The weights of a pixel's neighbours add up to this: twice over 8 bits they stay within int32."""
ONE = 2**16
"""A factor, or a distance in pixels, of 1."""

_LUMA = (19595, 38470, 7471)  # ITU-R 601: 0.299, 0.587, 0.114
_SMOOTH_CENTRE, _SMOOTH_SUM = 5, 13


def windows(images: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """`[B, height, width, C]` of each image `[B, H, W, C]`, from its corner `top`, `left` `[B]` on."""
    corners = zip(images, top.tolist(), left.tolist(), strict=True)
    return torch.stack([image[y : y + height, x : x + width] for image, y, x in corners])


def resized_crop(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """A box of each image, `[B]` each, enlarged to `[H, W]`: bilinear, centres of pixels at halves."""
    rows, lines, columns, channels = images.shape
    above, below, low = _taps(top, height, lines)
    number = _numbers(images).unsqueeze(1) * lines
    flat = images.view(-1, columns * channels)
    first, second = (flat.index_select(0, (number + each).flatten()).int() for each in (above, below))
    tall = _between(first, second, low.view(-1, 1))
    flat = tall.view(-1, channels)
    start = torch.arange(rows * lines, device=images.device).view(rows, lines, 1) * columns
    before, after, right = _taps(left, width, columns)
    first, second = (
        flat.index_select(0, (start + each.unsqueeze(1)).flatten()).view_as(images) for each in (before, after)
    )
    return _to_steps(_between(first, second, right[:, None, :, None]), WEIGHT**2)


def mirrored(images: Tensor, axis: int) -> Tensor:
    """Images flipped along axis 1 (upside down) or 2 (left to right)."""
    return images.flip(axis)


def filled(images: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor, *, fill: int) -> Tensor:
    """Images whose box, `[B]` each, has the value `fill`."""
    changed = images.clone()
    for image, *box in zip(changed, *(each.tolist() for each in (top, left, height, width)), strict=True):
        y, x, tall, wide = box
        image[y : y + tall, x : x + wide] = fill
    return changed


def pasted(images: Tensor, others: Tensor, top: Tensor, left: Tensor, height: Tensor, width: Tensor) -> Tensor:
    """Images whose box, `[B]` each, is that of `others [B, H, W, C]`."""
    changed = images.clone()
    boxes = zip(*(each.tolist() for each in (top, left, height, width)), strict=True)
    for image, other, (y, x, tall, wide) in zip(changed, others, boxes, strict=True):
        image[y : y + tall, x : x + wide] = other[y : y + tall, x : x + wide]
    return changed


def blended(images: Tensor, other: Tensor | int, factor: Tensor) -> Tensor:
    """`other + factor / 65536 (images - other)`, from 0 to 255; factor `[B]`, above 1 it goes beyond the image."""
    factor = _per_row(factor.int())
    mixed = (images.int() - other).mul_(factor).add_(other * ONE if isinstance(other, int) else other.int() * ONE)
    return _to_steps(mixed, ONE, beyond=True)


def luma(images: Tensor) -> Tensor:
    """Brightness as it is seen, int32 `[B, H, W, 1]` from 0 to 255 (ITU-R 601)."""
    if images.shape[3] == 1:
        return images.int()
    weighted = [images[..., index].int().mul_(weight) for index, weight in enumerate(_LUMA)]
    return _to_steps(weighted[0] + weighted[1] + weighted[2], ONE).int().unsqueeze(3)


def mean_luma(images: Tensor) -> Tensor:
    """The mean of `luma`, rounded: int32 `[B, 1, 1, 1]`."""
    values = luma(images).flatten(1)
    total, count = values.sum(dim=1), values.shape[1]
    return _per_row(((2 * total + count) // (2 * count)).int())


def smoothed(images: Tensor) -> Tensor:
    """Each pixel as 5/13 of itself and 1/13 of each neighbour, but for the border: int32 `[B, H, W, C]`."""
    values = images.int()
    if min(images.shape[1:3]) < 3:
        return values
    lines = values[:, :-2] + values[:, 1:-1] + values[:, 2:]
    inner = values[:, 1:-1, 1:-1]
    total = lines[:, :, :-2] + lines[:, :, 1:-1] + lines[:, :, 2:] + (_SMOOTH_CENTRE - 1) * inner
    values = values.clone()
    values[:, 1:-1, 1:-1] = (total + _SMOOTH_SUM // 2) // _SMOOTH_SUM
    return values


def hue_turned(images: Tensor, turn: Tensor) -> Tensor:
    """Images of 3 channels, their hue turned by `turn / 65536` sixths of the circle, `[B]`; value and chroma stay.

    The hue is that of HSV (Smith 1978, "Color gamut transform pairs").
    """
    red, green, blue = (images[..., index].int() for index in range(3))
    value = torch.maximum(torch.maximum(red, green), blue)
    chroma = value - torch.minimum(torch.minimum(red, green), blue)
    is_red = (value == red).int()
    is_green = (value == green).int() * (1 - is_red)
    is_blue = 1 - is_red - is_green
    apart = (green - blue) * is_red + (blue - red) * is_green + (red - green) * is_blue
    hue = apart.mul_(ONE).div_(chroma.clamp(min=1), rounding_mode="floor") + (2 * is_green + 4 * is_blue) * ONE
    hue += turn.int()[:, None, None]  # from -4 to 8 sixths
    shown = []
    for middle in (0, 2, 4):
        behind, here, ahead = ((hue - (middle + circle) * ONE).abs_() for circle in (-6, 0, 6))
        away = torch.minimum(torch.minimum(behind, here), ahead)
        shown.append(_to_steps((value - chroma) * ONE + chroma * (2 * ONE - away).clamp_(0, ONE), ONE))
    return torch.stack(shown, dim=-1)


def blurred(images: Tensor, weights: Tensor) -> Tensor:
    """Images convolved along both axes with `weights [B, K]`, K odd, whose sums are 2048; mirrored at the border.

    K is at most twice the smaller side, less 1.
    """
    return _to_steps(_convolved(_convolved(images.int(), weights.int(), 1), weights.int(), 2), WEIGHT**2)


def posterized(images: Tensor, bits: int) -> Tensor:
    """Images of which the highest `bits` of each value stay."""
    return torch.bitwise_and(images, 256 - 2 ** (8 - bits))


def solarized(images: Tensor, threshold: int) -> Tensor:
    """Images whose values from `threshold` on are inverted."""
    return torch.bitwise_xor(images, (images >= threshold).byte() * 255)


def auto_contrasted(images: Tensor) -> Tensor:
    """Each channel of each image stretched, so that its darkest value is 0 and its brightest 255; rounded down."""
    low, high = images.amin(dim=(1, 2)).int().unsqueeze(2), images.amax(dim=(1, 2)).int().unsqueeze(2)
    steps = torch.arange(256, dtype=torch.int32, device=images.device)
    stretched = torch.div((steps - low) * 255, (high - low).clamp(min=1), rounding_mode="floor")
    return _looked_up(images, torch.where(high > low, stretched, steps))


def equalized(images: Tensor) -> Tensor:
    """Each channel of each image with its values spread, as even as their counts allow (as Pillow does)."""
    rows, channels = images.shape[0], images.shape[3]
    places = (images.long() + _table_starts(images)).flatten()
    counts = torch.bincount(places, minlength=rows * channels * 256).view(rows, channels, 256)
    brightest = images.amax(dim=(1, 2)).long().unsqueeze(2)
    step = (counts.sum(dim=2, keepdim=True) - counts.gather(2, brightest)) // 255
    below = counts.cumsum(dim=2) - counts
    spread = torch.div(step // 2 + below, step.clamp(min=1), rounding_mode="floor")
    return _looked_up(images, torch.where(step > 0, spread, torch.arange(256, device=images.device)))


def affine(images: Tensor, matrix: Tensor, fill: int) -> Tensor:
    """Images whose pixel (x, y) is the nearest to `(a x + b y + c, d x + e y + f)`, or `fill` where there is none.

    `matrix [B, 6]` is a to f in 1/65536; coordinates are those of the pixels' centres, x to the right, y down.
    """
    _, lines, columns, channels = images.shape
    a, b, c, d, e, f = (each.long()[:, None, None] for each in matrix.unbind(dim=1))
    x, y = torch.arange(columns, device=images.device), torch.arange(lines, device=images.device).unsqueeze(1)
    across = ((a * x + (c + (a + b + 1) // 2)) + b * y).bitwise_right_shift_(16).clamp_(-1, columns)
    down = ((d * x + (f + (d + e + 1) // 2)) + e * y).bitwise_right_shift_(16).clamp_(-1, lines)
    framed = torch.nn.functional.pad(images, (0, 0, 1, 1, 1, 1), value=fill)
    top = _numbers(images)[:, None, None] * (lines + 2) + 1
    place = down.add_(top).mul_(columns + 2).add_(across).add_(1)
    return framed.view(-1, channels).index_select(0, place.flatten()).view_as(images)


def _taps(start: Tensor, length: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Both neighbours `[B, size]` of each place, the second's weight; `length` pixels from `start` become `size`."""
    places, start, length = torch.arange(size, device=start.device), start.unsqueeze(1), length.unsqueeze(1)
    found = ((2 * places + 1) * length - size) * WEIGHT // (2 * size)
    found = found.clamp(min=0).minimum((length - 1) * WEIGHT)
    first = found // WEIGHT
    second = torch.minimum(first + 1, length - 1)
    return start + first, start + second, (found % WEIGHT).int()


def _between(first: Tensor, second: Tensor, weight: Tensor) -> Tensor:
    """`first` and `second`, which gets `weight`; times 2048."""
    return (second - first).mul_(weight).add_(first.mul_(WEIGHT))


def _convolved(values: Tensor, weights: Tensor, axis: int) -> Tensor:
    size, reach = values.shape[axis], weights.shape[1] // 2
    places = torch.arange(-reach, size + reach, device=values.device).abs()
    wide = values.index_select(axis, torch.minimum(places, 2 * (size - 1) - places))
    total = torch.zeros_like(values)
    for tap in range(weights.shape[1]):
        total.addcmul_(wide.narrow(axis, tap, size), _per_row(weights[:, tap]))
    return total


def _looked_up(images: Tensor, tables: Tensor) -> Tensor:
    """`tables [B, C, 256]` at the values of the images."""
    places = (images.int() + _table_starts(images).int()).flatten()
    return tables.clamp(0, 255).to(torch.uint8).flatten().index_select(0, places).view_as(images)


def _table_starts(images: Tensor) -> Tensor:
    channels = images.shape[3]
    number = _per_row(_numbers(images)) * channels + torch.arange(channels, device=images.device)
    return number * 256


def _to_steps(values: Tensor, unit: int, beyond: bool = False) -> Tensor:
    """int32 `values / unit`, rounded half up, as uint8; changes `values`. With `beyond` they may leave 0 to 255."""
    values += unit // 2
    values.bitwise_right_shift_(unit.bit_length() - 1)
    return (values.clamp_(0, 255) if beyond else values).to(torch.uint8)


def _per_row(values: Tensor) -> Tensor:
    """`[B]` as `[B, 1, 1, 1]`."""
    return values.view(-1, 1, 1, 1)


def _numbers(images: Tensor) -> Tensor:
    """Row numbers `[B]`."""
    return torch.arange(len(images), device=images.device)
