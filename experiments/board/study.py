"""What the board's workers measure. The recipes are the other files of this folder."""

from experiments.lab import Study
from experiments.lab.board import measure

STUDY = Study(question="Which recipe is best?", published="", variants=dict, measure=measure)
