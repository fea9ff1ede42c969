"""The command line, from a checkout: ``python cli.py fit ...`` is ``opsd fit ...``."""

from opsd_lightning.main import entry

if __name__ == "__main__":
    entry()
