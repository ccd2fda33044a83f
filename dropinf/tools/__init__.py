"""What people run: the demo, the doctor, the microbenchmark."""

from pathlib import Path


def bench(preset: str, out: Path, against: Path | None = None) -> int:
    """Run the microbenchmark, see `microbenchmark.main.run`, which is imported only now."""
    from dropinf.tools.microbenchmark import main

    return main.run(preset, out, against)
