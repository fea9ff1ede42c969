"""The command line, from a checkout: ``python cli.py fit ...`` is ``opsd fit ...``."""

from opsd_lightning.__main__ import entry

if __name__ == "__main__":
    entry()
