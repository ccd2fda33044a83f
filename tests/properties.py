"""hypothesis; where it is missing, a stand-in that skips the tests which use it."""

from __future__ import annotations

import pytest

try:
    import hypothesis.strategies as st
    from hypothesis import given, settings
except ImportError:

    class _Anything:
        def __getattr__(self, name):
            return lambda *args, **kwargs: self

    st = _Anything()

    def settings(**options):
        return lambda test: test

    def given(**strategies):
        def skipped(test):
            @pytest.mark.skip(reason="hypothesis is not installed")
            def without_arguments():
                pass

            without_arguments.__name__ = test.__name__
            return without_arguments

        return skipped


__all__ = ["given", "settings", "st"]
