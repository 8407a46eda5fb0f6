"""What is used of torch that torch does not promise to keep: one file per concern, so that a new release is met in one place."""
