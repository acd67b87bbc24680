"""The commands: each module has a `main`, which `pacemark COMMAND` calls too, and can be run as a file.

They may import everything, and nothing imports them but run.py and the package pacemark.
"""
