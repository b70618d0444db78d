"""A folder for a study of one's own: `python -m experiments.lab new NAME`."""

import re
import shutil
import tempfile
from pathlib import Path

STUDY = '''"""Does half the learning rate lower the loss?

Published: the papers' figure, in one line.
"""

from dsv3_jax.config import replace
from experiments.lab import Claim, Column, Stake, Study


def variants(base):
    """Return the runs as changes of the base recipe; differences refer to the first one."""
    slow = replace(base.optim, learning_rate=base.optim.learning_rate / 2)
    hardly = replace(
        base.optim, learning_rate=base.optim.learning_rate / 100, final_learning_rate=0.0
    )
    return {
        "as it is": base,
        "half the rate": replace(base, optim=slow),
        "hardly any rate": replace(base, optim=hardly),
    }


STUDY = Study(
    variants=variants,
    columns=(Column("validation loss", "val_loss", 4, paired=True),),
    # What the papers lead to expect. Their noise is shrunk to that of the recipe.
    claims=(Claim("half the rate has a lower loss", "half the rate", "as it is", stake="rate"),),
    # What taking the subject away costs: if that is not above 0, there is no verdict.
    stakes={"rate": Stake("hardly any learning", "hardly any rate", "as it is")},
)
'''
README = """# Does half the learning rate lower the loss?

Published: what the papers report, with its size and source.

What is varied, what stays equal, and what is measured.

```bash
python -m experiments.lab run {number:02d} --short   # a few steps, to check that it works
python -m experiments.lab run {number:02d}
```

<!-- results -->
<!-- /results -->

## Verdict

Not run yet. The answer goes here, in bold, as its first sentence.
"""


def make(name: str, experiments: Path) -> Path:
    """Write study.py and README.md of a study with the next free number. Returns its folder.

    Raises: ValueError for a name that is not one word, or is taken.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,40}", name):
        raise ValueError(
            f"name={name!r} is not a short word of a to z, 0 to 9 and _; write it as my_question"
        )
    folders = [path for path in experiments.glob("[0-9][0-9]_*") if path.is_dir()]
    if taken := [path.name for path in folders if path.name[3:] == name]:
        raise ValueError(f"name={name!r} is taken by {taken[0]}; choose another name")
    number = 1 + max((int(path.name[:2]) for path in folders), default=0)
    if number > 99:
        raise ValueError(f"name={name!r} would be study {number}; folders have two digits")
    folder = experiments / f"{number:02d}_{name}"
    with tempfile.TemporaryDirectory(dir=experiments, prefix=".new-") as temporary:
        part = Path(temporary) / folder.name
        part.mkdir()
        (part / "study.py").write_text(STUDY)
        (part / "README.md").write_text(README.format(number=number))
        shutil.move(part, folder)
    return folder
