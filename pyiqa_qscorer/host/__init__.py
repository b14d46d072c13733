"""Registration with pyiqa. The only place of the package that deals with pyiqa."""
