"""What is used of torch that torch does not promise to keep: one file per concern, so that a new release is met in one place.

Each file says which names it uses and what takes the place of each, should it go. All of them are in torch 2.4, the oldest version that
works, unless a later version stands beside the name; such a name has a fallback. No other file of the package uses a private name of torch
(tests/tidy/python.rs checks that), with one exception: ``Tensor._version``, which torch's documentation names.
"""
