"""Measure what the machine can give, then what of it is reached."""
