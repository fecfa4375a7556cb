"""Callbacks for trainers that own the loop, and metrics: one thin file each. No other room imports them."""
