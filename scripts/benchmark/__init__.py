"""Stillpoint and its peers, measured side by side: the parts of scripts/bench."""
