"""Settings by pairs: each two meet in a tiny run or request, whose result is compared, or refused.

A feature that is right alone may be wrong beside another. `settings.FACTORS` and `decoding.FACTORS`
list what may be chosen, `covering.cover` makes rows in which each two values meet, and `check_row`
of `training` and `decoding` does one row. The package itself says which values do not go together:
nothing is listed here by hand. `make pairs` does all rows, and `tests/test_pairs.py` a few of them.
"""
