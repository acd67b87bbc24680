"""What lies on disk of a trial: its folder, its manifest, its evaluations, the lease of who may write there,
and the archives that folders are packed into.

It may import config and interface. Trials write through it, scoring reads through it.
"""
