"""The emulator itself: it does what a GPU does, and finds what goes wrong there."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cuda_emulation.build import FOLDER, ROOT, compile_library, sanitizer_environment, translate
from tests.cuda_emulation.run import CARDS
from tests.cuda_emulation.toys import Toys

SEEDS = range(4)
TOYS = FOLDER / "toys.cu"


@pytest.fixture(scope="module")
def toys() -> Toys:
    return Toys(compile_library([TOYS], base=FOLDER))


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_and_blocks_know_who_they_are(toys: Toys, seed: int) -> None:
    result = toys.run("index_of_thread", 24 * 60, grid=(2, 3, 4), block=(5, 4, 3), seed=seed)
    assert result == [1000 * block + thread for block in range(24) for thread in range(60)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("threads", [1, 33, 256, 1024])
def test_barriers_and_dynamic_shared_memory(toys: Toys, seed: int, threads: int) -> None:
    values = list(range(3 * threads))
    result = toys.run(
        "reverse_in_dynamic_memory",
        3 * threads,
        grid=(3, 1, 1),
        block=(threads, 1, 1),
        values=values,
        shared_bytes=4 * threads,
        seed=seed,
    )
    assert result == [v for block in range(3) for v in reversed(values[block * threads : (block + 1) * threads])]


@pytest.mark.parametrize("seed", SEEDS)
def test_many_barriers_in_turn(toys: Toys, seed: int) -> None:
    values = [random.Random(i).randrange(1000) for i in range(512)]
    assert toys.run("sum_of_block", 2, grid=(2, 1, 1), block=(8, 8, 8), values=values, seed=seed) == [sum(values)] * 2


@pytest.mark.parametrize(
    ("values", "expected"), [([0] * 64, [0, 0, 0]), ([1] * 64, [64, 1, 1]), ([0, 5] * 32, [32, 1, 0])]
)
def test_votes_of_a_block(toys: Toys, values: list[int], expected: list[int]) -> None:
    for seed in SEEDS:
        assert toys.run("votes_of_block", 3, block=(64, 1, 1), values=values, seed=seed) == expected


@pytest.mark.parametrize("seed", SEEDS)
def test_warp_functions(toys: Toys, seed: int) -> None:
    values = [7 * i % 61 for i in range(64)]
    result = toys.run("warp_functions", 8 * 64, block=(64, 1, 1), values=values, seed=seed)
    for thread in range(64):
        first, lane = thread // 32 * 32, thread % 32
        warp = values[first : first + 32]
        ballot = sum((value & 1) << i for i, value in enumerate(warp))
        assert result[8 * thread : 8 * thread + 8] == [
            warp[5],
            warp[lane - 3 if lane >= 3 else lane],
            warp[lane + 3 if lane < 29 else lane],
            warp[lane ^ 6],
            ballot - (ballot >> 31 << 32),
            1,
            warp[lane - 1 if lane % 8 else lane],
            (1000 if lane < 16 else 2) * warp[lane ^ 1],
        ]


@pytest.mark.parametrize("seed", SEEDS)
def test_atomics(toys: Toys, seed: int) -> None:
    result = toys.run("atomics", 7, grid=(3, 1, 1), block=(100, 1, 1), seed=seed)
    assert result == [300 * 299 // 2, 0, 299, -1, 0, 300, 7]


def test_order_of_threads_and_blocks_follows_the_seed(toys: Toys) -> None:
    orders = [toys.run("order_of_threads", 129, grid=(2, 1, 1), block=(64, 1, 1), seed=seed)[1:] for seed in SEEDS]
    assert orders[0] == list(range(128))
    assert all(sorted(order) == orders[0] for order in orders)
    assert len({tuple(order) for order in orders}) == len(SEEDS)
    assert {order[0] // 64 for order in orders} == {0, 1}


def test_barriers_do_not_wait_for_threads_that_have_ended(toys: Toys) -> None:
    for seed in SEEDS:
        assert toys.run("leave_early", 64, block=(64, 1, 1), seed=seed) == [32, 0] * 32


def test_seeds_show_a_race(toys: Toys) -> None:
    in_order = toys.run("race", 64, block=(64, 1, 1))
    assert in_order == [0, *range(63)]
    assert any(toys.run("race", 64, block=(64, 1, 1), seed=seed) != in_order for seed in range(1, 4))


def test_seeds_show_a_lost_update(toys: Toys) -> None:
    assert toys.run("lost_update", 2, block=(64, 1, 1)) == [64, 64]
    assert all(toys.run("lost_update", 2, block=(64, 1, 1), seed=seed)[0] < 64 for seed in range(1, 4))


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_copies_are_there_when_they_have_been_waited_for(toys: Toys, seed: int) -> None:
    values = list(range(128))
    last = [4 * thread + 3 for thread in range(32)]
    both = [value for pair in zip(last, reversed(last), strict=True) for value in pair]
    assert toys.run("copies", 64, values=values, a=2, seed=seed) == both
    garbage = toys.run("copies", 64, values=values, a=0, seed=seed)
    assert set(garbage[::2]) == {int.from_bytes(b"\xfd\xff\xfd\xff", "little", signed=True)}
    assert garbage[1::2] == both[1::2]
    with pytest.raises(RuntimeError, match=r"thread .* has ended without waiting for the copies"):
        toys.run("copies", 64, values=values, a=1, seed=seed)
    with pytest.raises(RuntimeError, match="copies 4, 8 or 16 bytes between multiples of as many, got 16 from 0x"):
        toys.run("misaligned_copy", 1, values=values, block=(1, 1, 1), seed=seed)


def test_shared_memory_is_garbage_in_every_block(toys: Toys) -> None:
    assert toys.run("uninitialised", 2, grid=(1, 1, 1), shared_bytes=16, block=(1, 1, 1)) == [1, 1]
    assert toys.run("uninitialised", 2, grid=(3, 1, 1), shared_bytes=16, block=(1, 1, 1)) == [1, 1]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "barrier_and_shuffle",
            r"block \(0, 0, 0\), deadlock: threads wait for each other\n"
            r"  thread \(0, 0, 0\) and 30 more in __syncthreads at \S+toys.cu:\d+\n"
            r"  thread \(31, 0, 0\) in __shfl_sync with mask 0xffffffff at \S+toys.cu:\d+",
        ),
        (
            "two_barriers",
            r"thread \(\d+, 0, 0\) is in __syncthreads at \S+:\d+ while thread \(\d+, 0, 0\) waits in __syncthreads at",
        ),
        ("shuffle_with_the_dead", "thread .*(names a lane that has ended|has ended, but others wait for it)"),
        ("shuffle_from_outside", r"thread \(\d, 0, 0\): __shfl_sync at \S+ reads lane 9, which its mask leaves out"),
        ("throwing", "thread 7"),
    ],
)
def test_what_would_hang_or_is_undefined_is_an_error(toys: Toys, name: str, message: str, seed: int) -> None:
    threads = 64 if name == "two_barriers" else 32
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            toys.run(name, 64, block=(threads, 1, 1), seed=seed)
    # The next launch is unaffected.
    assert toys.run("many_barriers", 64, block=(64, 1, 1), a=3, seed=seed) == [3] * 64


@pytest.mark.parametrize(
    ("grid", "block", "shared_bytes", "message"),
    [
        ((0, 1, 1), (32, 1, 1), 0, "invalid configuration"),
        ((1, 65536, 1), (32, 1, 1), 0, "invalid configuration"),
        ((1, 1, 1), (1025, 1, 1), 0, "invalid configuration"),
        ((1, 1, 1), (32, 32, 2), 0, "invalid configuration"),
        ((1, 1, 1), (1, 1, 65), 0, "invalid configuration"),
        ((1, 1, 1), (32, 1, 1), 48 * 1024 + 1, "invalid argument"),
    ],
)
def test_launches_that_a_gpu_refuses(toys: Toys, grid: tuple, block: tuple, shared_bytes: int, message: str) -> None:
    with pytest.raises(RuntimeError, match=f"^{message} argument, {message}|^{message}, {message}"):
        toys.run("index_of_thread", 1, grid=grid, block=block, shared_bytes=shared_bytes)


def test_large_shared_memory_wants_permission() -> None:
    toys = Toys(compile_library([TOYS], base=FOLDER))
    launch = {"length": 32, "values": range(32), "shared_bytes": 100_000}
    with pytest.raises(RuntimeError, match="invalid argument"):
        toys.run("reverse_in_dynamic_memory", **launch)
    with pytest.raises(RuntimeError, match="invalid argument"):
        toys.run("allow_shared_memory", 1, a=232449)
    toys.run("allow_shared_memory", 1, a=100_000)
    assert toys.run("reverse_in_dynamic_memory", **launch) == list(range(31, -1, -1))


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[int]]:
    """Runs a kernel with 4096 bytes of static shared memory on a card that gives a block as many bytes as told."""

    def run(card: int, shared_bytes: int, allowed: int | None = None) -> list[int]:
        # A kernel keeps its permission for the life of the process, so each run has a library of its own.
        library = tmp_path_factory.mktemp("toys") / "library.so"
        shutil.copy(compile_library([TOYS], base=FOLDER), library)
        toys = Toys(library)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("GROOTVL_EMULATION_SHARED_BYTES", str(card))
            if allowed is not None:
                toys.run("allow_sum_of_block", 1, a=allowed)
            return toys.run("sum_of_block", 1, block=(32, 1, 1), values=[1] * 32, shared_bytes=shared_bytes)

    return run


@pytest.mark.parametrize("card", CARDS)
def test_static_shared_memory_is_part_of_what_a_kernel_may_have(both: Callable[..., list[int]], card: int) -> None:
    assert both(card, 44 * 1024) == [32]
    for shared_bytes in (44 * 1024 + 1, 48 * 1024):
        with pytest.raises(RuntimeError, match=f"refused: {shared_bytes} bytes of dynamic and 4096 of static.* 49152"):
            both(card, shared_bytes)
    assert both(card, card - 4096, allowed=card - 4096) == [32]
    with pytest.raises(RuntimeError, match=f"refused: .* 4096 of static shared memory, the kernel may have {card}"):
        both(card, card - 4095, allowed=card - 4095)
    with pytest.raises(RuntimeError, match="invalid argument"):
        both(card, 0, allowed=card + 1)


@pytest.fixture(scope="module")
def sanitized() -> Path:
    return compile_library([TOYS], base=FOLDER, sanitizer="address")


@pytest.fixture(scope="module")
def watched() -> Path:
    return compile_library([TOYS], base=FOLDER, sanitizer="thread")


def run_sanitized(library: Path, *arguments: str, sanitizer: str = "address") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "tests.cuda_emulation.toys", str(library), *arguments],
        env=os.environ | sanitizer_environment(sanitizer),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("write_outside", "0", "32"), "heap-buffer-overflow"),
        (("write_outside", "1", "8"), "heap-buffer-overflow"),
        (("write_outside", "2", "8"), "heap-buffer-overflow"),
        (("write_outside", "2", "-1"), "heap-buffer-overflow"),
        (("undefined", "2147483647"), "signed integer overflow"),
        (("misaligned",), "misaligned address"),
    ],
)
def test_sanitizers_see_kernels(sanitized: Path, arguments: tuple, message: str) -> None:
    result = run_sanitized(sanitized, *arguments)
    assert result.returncode != 0
    assert message in result.stderr
    assert "toys.cu" in result.stderr


@pytest.mark.parametrize("arguments", [("write_outside", "1", "7"), ("many_barriers", "100"), ("barrier_and_shuffle",)])
def test_sanitizers_accept_what_is_right(sanitized: Path, arguments: tuple) -> None:
    result = run_sanitized(sanitized, *arguments)
    assert "Sanitizer" not in result.stderr
    assert (result.returncode == 0) == (arguments[0] != "barrier_and_shuffle")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["race", "race_over_a_shuffle", "race_between_blocks", "lost_update"])
def test_the_thread_sanitizer_sees_races_in_any_order_of_threads(watched: Path, name: str) -> None:
    result = run_sanitized(watched, name, sanitizer="thread")
    assert result.returncode != 0
    assert "data race" in result.stderr
    assert "toys.cu" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["barrier_of_a_warp", "atomics", "leave_early", "many_barriers"])
def test_the_thread_sanitizer_accepts_what_is_ordered(watched: Path, name: str) -> None:
    result = run_sanitized(watched, name, "3", sanitizer="thread")
    assert result.returncode == 0, result.stderr


def test_translation_keeps_comments_and_lines(tmp_path: Path) -> None:
    source = tmp_path / "some.cu"
    source.write_text(
        '// __shared__ int none;\n"__shared__ int none;";\n__shared__ alignas(16) Pair<int, 4>\n  x[2][kSize];\n'
        "extern  __shared__ __align__(16) unsigned char memory[];\nTORCH_LIBRARY_IMPL(grootvl, CUDA, m) {}\n"
    )
    lines = translate(source).splitlines()
    assert lines[0] == f'#line 1 "{source}"'
    assert lines[1:3] == ["// __shared__ int none;", '"__shared__ int none;";']
    assert "using x_shared_type = Pair<int, 4>[2][kSize];" in lines[3]
    pointer = "unsigned char* const&"
    assert lines[5] == f"static {pointer} memory = reinterpret_cast<{pointer}>(emulation::dynamic_shared_memory);"
    assert lines[6] == "TORCH_LIBRARY_IMPL(grootvl, CPU, m) {}"


@pytest.mark.parametrize("declaration", ["__shared__ int a, b;", "__shared__ int a = 3;"])
def test_what_is_not_understood_is_an_error(tmp_path: Path, declaration: str) -> None:
    source = tmp_path / "some.cu"
    source.write_text(declaration)
    with pytest.raises(ValueError, match="must declare one variable without a value"):
        translate(source)
