"""The ops, faster: one folder a device; `table.py` lists them, and `choose.py` chooses."""
