"""Vertical micro-batches: a block runs over slices of the batch while its weights stay where they are."""
