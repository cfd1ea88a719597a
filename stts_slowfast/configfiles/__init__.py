"""Config files: found and read with their bases (``files``); their keys and values (``values``)."""
