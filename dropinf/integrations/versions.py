"""Which versions of a foreign tool an adapter was tested with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def require(package: str, series: str) -> None:
    """Refuse versions of `package` outside of `series`, such as "0.3"; patch levels may differ.

    Raises:
        ImportError: the package is missing, or of another series.
    """
    try:
        found = version(package)
    except PackageNotFoundError as error:
        raise ImportError(
            f"dropinf.integrations: {package} is not installed; pip install '{package}=={series}.*'"
        ) from error
    if found.split(".")[:2] != series.split("."):
        raise ImportError(
            f"dropinf.integrations: {package} {found} is not supported, tested is {series}.x; "
            f"pip install '{package}=={series}.*'"
        )
