"""Training runs and comparisons: what the ``tekfac`` command does, usable from Python too.

Data take one way: ``config`` says what is to be done, ``data``, ``networks`` and ``optimizers``
build the parts by name, ``training`` runs them, ``runs`` keeps the results on disk, ``plots`` and
``comparison`` read results back, and ``commands`` alone talks to the user, whose wishes may come
from ``presets`` and, by ``options``, from a file.
"""
