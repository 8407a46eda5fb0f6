"""Units: the modules that are paged together, how they are found in a model, and the number formats of their parameters."""
