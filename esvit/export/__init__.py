"""Backbones for other programs: one function per format writes the files, loads them as their user will, and says how."""
