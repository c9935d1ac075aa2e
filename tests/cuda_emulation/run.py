"""Runs tests with emulated CUDA kernels on the CPU instead of the compiled CPU kernels.

``python -m tests.cuda_emulation.run [--seed N] [--shared-bytes N] [--sanitize [thread]] [arguments of pytest]``
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from tests.cuda_emulation.build import ROOT, operator_library, sanitizer_environment

# Shared memory that a block may have, in bytes: compute capability 8.6, 8.9 and 12.0; 8.0; 9.0 and 10.0.
CARDS = (101376, 166912, 232448)
OPERATOR_TESTS = tuple(
    f"tests/ops/test_{name}.py"
    for name in ("tree", "graph", "scan", "selective_scan", "norm", "conv", "library", "published_semantics")
)


def command(arguments: Sequence[str] = ()) -> list[str]:
    """The pytest command for tests of the CUDA kernels; runs all of them if ``arguments`` name no tests."""
    names_tests = any(argument.startswith("tests/") for argument in arguments)
    tests = () if names_tests else OPERATOR_TESTS
    # Sanitizers write to stderr and end the process; captured by file descriptor, the report would be lost.
    return [sys.executable, "-m", "pytest", "--capture=sys", "-m", "not cpu_kernels and not gpu", *tests, *arguments]


def environment(seed: int, sanitizer: str = "", shared_bytes: int = CARDS[-1]) -> dict[str, str]:
    """The environment of a process that uses the emulated operators; compiles them if they have changed."""
    variables = {
        "GROOTVL_LIBRARY": str(operator_library(sanitizer)),
        "GROOTVL_EMULATION_SEED": str(seed),
        "GROOTVL_EMULATION_SHARED_BYTES": str(shared_bytes),
    }
    return os.environ | variables | (sanitizer_environment(sanitizer) if sanitizer else {})


def run_tests(
    arguments: Sequence[str] = (), seed: int = 0, sanitizer: str = "", shared_bytes: int = CARDS[-1]
) -> subprocess.CompletedProcess:
    """The finished run of :func:`command`."""
    return subprocess.run(
        command(arguments),
        env=environment(seed, sanitizer, shared_bytes),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


def parse_args() -> argparse.Namespace:
    """Read the command line; what is not known here is for pytest."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="order of blocks and threads; 0 is ascending (default)")
    parser.add_argument(
        "--sanitize",
        nargs="?",
        const="address",
        default="",
        choices=("address", "thread"),
        help="with AddressSanitizer and UndefinedBehaviorSanitizer (address, the default), or with ThreadSanitizer",
    )
    parser.add_argument("--shared-bytes", type=int, default=CARDS[-1], help="shared memory of the card (%(default)s)")
    args, rest = parser.parse_known_args()
    args.pytest = rest
    return args


def main() -> None:
    """Become pytest."""
    args = parse_args()
    os.chdir(ROOT)
    os.execve(sys.executable, command(args.pytest), environment(args.seed, args.sanitize, args.shared_bytes))


if __name__ == "__main__":
    main()
