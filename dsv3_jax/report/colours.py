"""Colours of all pictures and pages: one colour has one meaning everywhere.

`DIVERGING` is for what is above or below even: blue below, nearly white at even, red above.
Lightness and chroma change linearly in OKLab from the middle to both ends, and both ends have the
same lightness. So equal differences of a value look equally large, and the picture is readable in
grey too. On a dark page the middle is dark and the ends are light. `MEANINGS` names the colours of
curves and points. They also differ in their markers if a picture has several.
Source of OKLab: Björn Ottosson, "A perceptual color space for image processing", 2020.
"""

from matplotlib.colors import LinearSegmentedColormap

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

# From BELOW over MIDDLE to ABOVE in equal steps of OKLab, as sRGB.
DIVERGING = LinearSegmentedColormap.from_list(
    "below_above",
    ["#1b549b", "#537cb3", "#87a4ca", "#bdcce0"]
    + ["#f5f5f5"]
    + ["#e4c1bc", "#d08e86", "#b85a51", "#9c1b1b"],
    N=257,
)
