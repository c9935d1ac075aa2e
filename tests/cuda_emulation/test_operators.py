"""The CUDA kernels without a GPU: they pass the tests of the operators, emulated on the CPU (tests/cuda_emulation)."""

import pytest

from tests.cuda_emulation.run import CARDS, run_tests

# Every kernel, in sizes that the sanitizers finish in minutes: with so little shared memory, images of 33 x 47 take the
# kernels for large images.
SMALL_CARD = 57344
SANITIZED = (
    "tests/ops/test_tree.py",
    "tests/ops/test_scan.py",
    "tests/ops/test_selective_scan.py",
    "tests/ops/test_norm.py",
    "tests/ops/test_conv.py",
    "-k",
    "(as_defined or any_memory_format or tree_equals_reference or all_dtypes or empty or non_contiguous or slices)"
    " and not (64-64 or 7-200 or 100-103)",
)

# Finite differences are thousands of launches, which another order does not make more telling. A tree of a million
# vertices takes as long as a third of all other tests; some of these have trees of 65,000.
FAST = ("-k", "not differences and not million")


@pytest.mark.parametrize(
    ("seed", "shared_bytes", "arguments"),
    [
        (1, CARDS[0], FAST),
        (2, CARDS[-1], FAST),
        pytest.param(3, CARDS[0], (), marks=pytest.mark.slow),
        pytest.param(4, CARDS[-1], (), marks=pytest.mark.slow),
    ],
    ids=["smallest", "largest", "smallest-all", "largest-all"],
)
def test_operators_pass_their_tests(seed: int, shared_bytes: int, arguments: tuple) -> None:
    result = run_tests(arguments, seed=seed, shared_bytes=shared_bytes)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address", "thread"])
def test_sanitizers_report_nothing(sanitizer: str) -> None:
    result = run_tests(SANITIZED, seed=2, sanitizer=sanitizer, shared_bytes=SMALL_CARD)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-8000:]
