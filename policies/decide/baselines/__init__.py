"""Schedulers from the literature to compare with, each named after its source."""
