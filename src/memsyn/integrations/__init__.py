"""Trainers that own the loop: one thin file each, imported by nobody else."""
