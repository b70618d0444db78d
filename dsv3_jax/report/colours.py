"""One colour map for what is above or below even: blue below, nearly white at even, red above.

Lightness and chroma change linearly in OKLab from the middle to both ends, and both ends have the same lightness. So
equal differences of a value look equally large, and the picture is readable in grey too.
Source of OKLab: Björn Ottosson, "A perceptual color space for image processing", 2020.
"""

import numpy as np
from jaxtyping import Float
from matplotlib.colors import ListedColormap

MIDDLE = (0.97, 0.0, 0.0)  # lightness, chroma, hue in degrees
BELOW = (0.45, 0.13, 256.0)
ABOVE = (0.45, 0.165, 27.0)

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


def diverging(steps: int = 128) -> ListedColormap:
    """The map, of `steps` colours on each side of even.

    Example:
        >>> diverging(steps=2).N  # two below, the middle, two above
        5
    """
    away = np.linspace(0, 1, steps + 1)[:, None]
    arms = []
    for lightness, chroma, hue in (BELOW, ABOVE):
        angle = np.deg2rad(hue)
        end = np.array([lightness, chroma * np.cos(angle), chroma * np.sin(angle)])
        arms.append(oklab_to_srgb(np.array(MIDDLE)[None] * (1 - away) + end[None] * away))
    return ListedColormap(np.concatenate([arms[0][::-1], arms[1][1:]]), name="below_above")


DIVERGING = diverging()
