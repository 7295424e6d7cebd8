"""Scores of a synthetic image against its reference, the floor they must beat, their summary."""
