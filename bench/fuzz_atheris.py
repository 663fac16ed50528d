"""One reader under atheris: `python -m bench.fuzz_atheris READER [libFuzzer options]`. Called by `fuzz`.

The modules of the reader are instrumented while they are imported, so they are imported here and nowhere before.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path


def main(arguments: list[str]) -> None:
    """Never returns: libFuzzer ends the process, with status 0 where it found nothing."""
    import atheris  # noqa: PLC0415 -- of a dependency group of its own

    with atheris.instrument_imports(include=["protocol", "gateway"]):
        from bench.fuzz_targets import SEEDS, TARGETS  # noqa: PLC0415 -- see above

    name, *options = arguments
    with tempfile.TemporaryDirectory(prefix="trireme-fuzz-") as corpus:
        for number, seed in enumerate(SEEDS[name]):
            (Path(corpus) / f"seed-{number}").write_bytes(seed)
        atheris.Setup([sys.argv[0], *options, corpus], TARGETS[name])
        atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1:])
