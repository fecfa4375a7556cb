"""Protects a memory during later training: the penalty, its two forms in an optimizer's step, and the strength."""
