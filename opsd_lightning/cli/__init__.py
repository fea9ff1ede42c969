"""The ``opsd`` command line."""
