"""The verifiers that ship, one small file each, found through the entry points that any package can use."""
