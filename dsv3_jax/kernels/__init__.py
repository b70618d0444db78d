"""The ops, faster: one folder a device; `choose.py` says which is used where."""
