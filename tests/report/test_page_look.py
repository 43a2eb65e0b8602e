"""The colours of the page: readable, and apart for eyes with and without colour blindness."""

import itertools
import math
import re

import pytest

from hotloop import report

STYLE = report._style()
# Machado, Oliveira and Fernandes 2009, severity 1, on linear RGB.
VISION = {
    "normal": ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    "protanopia": (
        (0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216),
        (-0.003882, -0.048116, 1.051998),
    ),
    "deuteranopia": (
        (0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413),
        (-0.011820, 0.042940, 0.968881),
    ),
    "tritanopia": (
        (1.255528, -0.076749, -0.178779), (-0.078411, 0.930809, 0.147602),
        (0.004733, 0.691367, 0.303900),
    ),
}  # fmt: skip


def schemes():
    """Colours by name of the light, the dark and the printed page."""
    blocks = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    assert len(blocks) == 3
    return [dict(re.findall(r"--(\w[\w-]*): (#[0-9a-f]{6})", block)) for block in blocks]


SCHEMES = dict(zip(("light", "dark", "print"), schemes(), strict=True))


def linear(colour):
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    return [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]


def contrast(one, other):
    """As WCAG 2 defines it, 1 to 21."""
    light = sorted(0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in map(linear, (one, other)))
    return (light[1] + 0.05) / (light[0] + 0.05)


def lab(channels):
    r, g, b = channels
    xyz = (
        (0.4124 * r + 0.3576 * g + 0.1805 * b) / 0.95047,
        0.2126 * r + 0.7152 * g + 0.0722 * b,
        (0.0193 * r + 0.1192 * g + 0.9505 * b) / 1.08883,
    )
    x, y, z = (t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in xyz)
    return 116 * y - 16, 500 * (x - y), 200 * (y - z)


def seen(colour, matrix):
    r, g, b = linear(colour)
    return lab([min(1.0, max(0.0, row[0] * r + row[1] * g + row[2] * b)) for row in matrix])


@pytest.mark.parametrize("scheme", SCHEMES)
def test_text_has_contrast(scheme):
    colours = SCHEMES[scheme]
    for text in ("ink", "soft", "link"):
        for behind in ("page", "tint"):
            assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)
    for text in ("good", "bad"):
        for behind in ("page", f"{text}-tint"):
            assert contrast(colours[text], colours[behind]) >= 4.5, (text, behind)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_marks_and_bars_stand_out_from_the_page(scheme):
    colours = SCHEMES[scheme]
    for name in (*(f"c{n}" for n in range(1, 9)), "strong"):
        assert contrast(colours[name], colours["page"]) >= 3, name


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_colours_are_apart_for_every_kind_of_eye(scheme, vision):
    eight = [SCHEMES[scheme][f"c{n}"] for n in range(1, 9)]
    spots = [seen(colour, VISION[vision]) for colour in eight]
    nearest = min(math.dist(a, b) for a, b in itertools.combinations(spots, 2))
    # A difference of 2.3 is just noticeable side by side; marks lie apart.
    assert nearest > 20


def test_the_measure_of_contrast_is_right():
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#767676", "#ffffff") == pytest.approx(4.54, abs=0.01)


def test_each_colour_that_is_used_is_defined_in_every_scheme():
    used = set(re.findall(r"var\(--([\w-]+)\)", STYLE))
    for colours in SCHEMES.values():
        assert used == set(colours)
