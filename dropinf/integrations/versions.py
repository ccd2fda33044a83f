"""Which versions of a foreign tool an adapter was tested with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version

_EXTRAS = {"traker": "trak"}  # of dropinf, where one is not called as the package is


@contextmanager
def tested(package: str, series: str, release: str | None = None) -> Iterator[None]:
    """Inside, an adapter takes what it needs of a tool: of a tested version, or not at all.

        with tested("dattri", "0.3"):
            from dattri.task import AttributionTask

    Names may be missing under a tested number too, as in a checkout of what comes next.

    Args:
        package: the distribution's name.
        series: the versions that are taken: "0.3" all of 0.3, "5" all of 5.
        release: the version that was tested, of a series wider than that; None is all of it.

    Raises:
        ImportError: the package is missing, of another series, or lacks a name that is taken.
    """
    try:
        found = version(package)
    except PackageNotFoundError as error:
        raise ImportError(
            f"dropinf.integrations needs {package}: "
            f"pip install 'dropinf[{_EXTRAS.get(package, package)}]'"
        ) from error
    wanted = series.split(".")
    if found.split(".")[: len(wanted)] != wanted:
        raise ImportError(
            f"dropinf.integrations: {package} {found} is not supported, tested is "
            f"{release or series + '.x'}; pip install '{package}=={series}.*'"
        )
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"dropinf.integrations: this {package} {found} is not like the releases that were "
            f"tested ({release or series + '.x'}): {error}; pip install --force-reinstall "
            f"--no-deps '{package}=={series}.*'"
        ) from error
