"""Scorers, operators, hosts and families of other packages, named in their entry points."""

import functools
from importlib.metadata import entry_points

GROUP = "stts_slowfast"


@functools.cache
def load_extensions() -> None:
    """Imports, once, every module that an installed package names in the group ``stts_slowfast``.

    Importing it is what registers it: in ``SCORERS``, ``OPERATORS``, ``HOSTS``, ``FAMILIES``. What
    fails there fails here: a run does not go on without what its config may name.
    """
    for entry in entry_points(group=GROUP):
        entry.load()
