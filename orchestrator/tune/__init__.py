"""Ray Tune: the search and the stand-ins of its trials."""
