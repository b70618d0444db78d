"""Forms of ops that only XLA's compiler for a device wants; a file has its row's name in TABLE."""
