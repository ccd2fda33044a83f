"""What people run: the demo, the doctor, the microbenchmark."""

from pathlib import Path
from typing import Any


def bench(
    preset: str, out: Path, against: Path | None = None
) -> tuple[dict[str, Any], list[str] | None]:
    """Run the microbenchmark, see `microbenchmark.main.run`, which is imported only now."""
    from dropinf.tools.microbenchmark import main

    return main.run(preset, out, against)
