"""The mathematics: pure functions on arrays. No Flax, no mesh, no files, no global state."""
