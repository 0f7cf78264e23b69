"""The one top-level package of the distribution: ``skipbus.services``, ``skipbus.shared`` and ``skipbus.ctl``.

Each of them is a link to a folder at the top of the repository
(``docs/decisions/0010-folders-installed-as-skipbus.md``).
"""
