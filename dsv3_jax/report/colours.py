"""Colours of all pictures and pages: one colour has one meaning everywhere.

`DIVERGING` is for what is above or below even: blue below, nearly white at even, red above. Lightness and chroma change
linearly in OKLab from the middle to both ends, and both ends have the same lightness. So equal differences of a value
look equally large, and the picture is readable in grey too. On a dark page the middle is dark and the ends are light.
`MEANINGS` names the colours of curves and points. They also differ in their markers if a picture has several.
Source of OKLab: Björn Ottosson, "A perceptual color space for image processing", 2020.
"""

import numpy as np
from jaxtyping import Float
from matplotlib.colors import ListedColormap

Polar = tuple[float, float, float]  # lightness, chroma, hue in degrees
MIDDLE: Polar = (0.97, 0.0, 0.0)
BELOW: Polar = (0.45, 0.13, 256.0)
ABOVE: Polar = (0.45, 0.165, 27.0)
DARK_MIDDLE: Polar = (0.30, 0.0, 0.0)
DARK_BELOW: Polar = (0.74, 0.13, 248.0)
DARK_ABOVE: Polar = (0.74, 0.15, 30.0)

# Meaning of a curve or a point → its colour on a light and on a dark page.
MEANINGS = {
    "this": ("#2a6db0", "#6aa9e8"),  # what was measured of this run, with all its parts
    "chance": ("#868c96", "#8d949f"),
    "without": ("#c75b12", "#f0994f"),  # the same without the router's bias
    "token": ("#00806e", "#2fbfa8"),  # what the token tells
    "domain": ("#a0307a", "#e57fc2"),  # what the domain tells
    "given": ("#6549bd", "#ab97f2"),  # what the domain tells once the token is known
    "other": ("#967000", "#d9b13b"),  # another run
    "heads": ("#8c5a2b", "#c99a6b"),  # multi-token heads
    "validation": ("#1c1e21", "#e6e8eb"),
}

TO_LMS = np.array(
    [[1, 0.3963377774, 0.2158037573], [1, -0.1055613458, -0.0638541728], [1, -0.0894841775, -1.2914855480]]
)
TO_RGB = np.array(
    [
        [4.0767416621, -3.3077115913, 0.2309699292],
        [-1.2684380046, 2.6097574011, -0.3413193965],
        [-0.0041960863, -0.7034186147, 1.7076147010],
    ]
)


def oklab_to_srgb(lab: Float[np.ndarray, "n 3"]) -> Float[np.ndarray, "n 3"]:
    """OKLab → sRGB in 0 … 1; what sRGB has not is cut off.

    Example:
        >>> oklab_to_srgb(np.array([[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]])).round(2).tolist()  # white and black
        [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    """
    linear = np.clip((lab @ TO_LMS.T) ** 3 @ TO_RGB.T, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def _lab(colour: Polar) -> Float[np.ndarray, "3"]:
    lightness, chroma, hue = colour
    return np.array([lightness, chroma * np.cos(np.deg2rad(hue)), chroma * np.sin(np.deg2rad(hue))])


def diverging(steps: int = 128, middle: Polar = MIDDLE, below: Polar = BELOW, above: Polar = ABOVE) -> ListedColormap:
    """The map, of `steps` colours on each side of even.

    Example:
        >>> diverging(steps=2).N  # two below, the middle, two above
        5
    """
    away = np.linspace(0, 1, steps + 1)[:, None]
    arms = [oklab_to_srgb(_lab(middle)[None] * (1 - away) + _lab(end)[None] * away) for end in (below, above)]
    return ListedColormap(np.concatenate([arms[0][::-1], arms[1][1:]]), name="below_above")


DIVERGING = diverging()
