"""Which versions of a foreign tool an adapter was tested with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version


def require(package: str, series: str, tested: str | None = None) -> None:
    """Refuse versions of `package` outside of `series`; what follows it may differ.

    Args:
        package: the distribution's name.
        series: the versions that are taken: "0.3" all of 0.3, "5" all of 5.
        tested: the version that was tested, of a series wider than that; None is all of it.

    Raises:
        ImportError: the package is missing, or of another series.
    """
    try:
        found = version(package)
    except PackageNotFoundError as error:
        raise ImportError(
            f"dropinf.integrations: {package} is not installed; pip install '{package}=={series}.*'"
        ) from error
    wanted = series.split(".")
    if found.split(".")[: len(wanted)] != wanted:
        raise ImportError(
            f"dropinf.integrations: {package} {found} is not supported, tested is "
            f"{tested or series + '.x'}; pip install '{package}=={series}.*'"
        )
