"""Precision tiers of linear layers: how each computes, and turning them live. Nothing is re-exported here."""
