"""Homes of parameters: edits that no guard saw, digests of bytes, parameters that were given other memory."""
