"""The mathematics: pure functions on arrays. No Flax, no mesh and no files.

The only state is two tables, `ROUTERS` and `RULES`, to which programs may add rows.
"""
