"""Which recipe is best?

The board's workers measure by this study. The recipes are the other files of this folder.
"""

from experiments.lab import Study
from experiments.lab.board import measure

STUDY = Study(variants=dict, measure=measure)
