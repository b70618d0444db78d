"""Forms of ops that only XLA's compiler for a device wants; a file has its row's name in TABLE.

cached_blocks.py and count_by_expert.py are parts that rows of several devices share.
"""
