"""Task scores: which texts a model takes for likelier, over folders of tasks in JSON lines."""
