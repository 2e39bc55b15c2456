"""Training runs: what is to be done, doing it, and what is kept of it on disk.

``config`` says what is to be done, ``tekfac.data``, ``tekfac.networks`` and ``optimizers`` build
the parts by name, ``training`` runs them and ``folder`` keeps the results; ``comparison`` is runs
of several optimizers on one task, and ``plots`` draws what came of them.
"""
