"""What lies on disk of a trial: its folder, its manifest, its evaluations, and the lease of who may write there.

It may import config and interface. Trials write through it, scoring reads through it.
"""
