"""The configuration of a trial: its schema, how a command line becomes one, hyperparameters and search spaces.

It may import the interface, and nothing of the rooms above. Modules that --help needs do not import torch.
"""

from harness import renamed

__getattr__ = renamed.names("harness.config")
