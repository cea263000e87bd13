"""``vcpo compare``: every method at every lag with every seed, and what it says.

:mod:`~vcpo.compare.grid` makes the cells, :mod:`~vcpo.compare.children` runs them in processes,
:mod:`~vcpo.compare.results` reads what came out, :mod:`~vcpo.compare.table` and :mod:`~vcpo.compare.page`
show it, :mod:`~vcpo.compare.command` does all of it. Importing this package loads nothing heavy.
"""
