"""A latency model of the scans on an H100: converts counted work to milliseconds. Nothing here is measured.

``python -m tests.cuda_emulation.latency_model``

The trees are those of random maps with the spectrum of photographs, cut into pieces as in ``pieces.cuh`` and into tiles
as in ``tiles.cuh``. The time of a kernel is the longest of three times: that of its memory traffic at the bandwidth of
a copy; that of its instructions at one per cycle and scheduler; and that of its blocks, which run one after another in
the resident slots of the multiprocessors, each waiting for memory and then for its longest piece. The model ignores
everything else, so it is a lower bound: an H100 took up to twice as long. Use it to decide which of two designs to
implement.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grootvl_mm.ops import Tree, grid_edge_weight, grid_tree

# H100 SXM: multiprocessors, cycles per second, bytes per second of a copy, warp instructions per cycle and
# multiprocessor; latency in cycles of a load, of a member of a piece (a load, a sum and a store in shared memory), of a
# critical vertex, and of a kernel launch. What a block may have, and what is reserved for it, in bytes.
PROCESSORS, CLOCK, BANDWIDTH, ISSUE = 132, 1.755e9, 2.86e12, 4
MEMORY_CYCLES, MEMBER_CYCLES, CRITICAL_CYCLES, LAUNCH_CYCLES = 700, 70, 75, 3500
SHARED_BYTES, RESERVED_BYTES, THREADS = 232448, 3072, 256


class Shape(NamedTuple):
    """The shape of a batch of feature maps."""

    name: str
    batch: int
    height: int
    width: int
    channels: int


SHAPES = (Shape("S1", 128, 56, 56, 160), Shape("DET", 2, 200, 334, 160))


class Design(NamedTuple):
    """The layout of tiles: the lanes per row, and the resident blocks per multiprocessor."""

    lanes: int
    blocks: dict[int, int]  # by the number of streams
    divides_rest: bool  # whether the shortest pieces get smaller tiles
    waits: int  # consecutive memory latencies before the pieces of a tile can be walked
    kernels: dict[str, tuple["Kernel", ...]]


class Kernel(NamedTuple):
    """A kernel over tiles, or over rows if it has no streams: the maps it reads and writes, and its walks over pieces.

    ``instructions`` are warp instructions per row of 32 channels, counted in the disassembly, for rank 5 of the step
    sizes. Partial sums of their products, for each row and 16 channels, count as 5/16 of a map.
    """

    name: str
    maps: float
    instructions: float
    streams: int = 0
    walks: int = 0


BEFORE = Design(
    lanes=8,
    blocks={1: 3, 2: 2},
    divides_rest=False,
    waits=4,
    kernels={
        "tree_scan": (Kernel("summarise", 2, 30, 1, 1), Kernel("finish", 3, 32, 1, 2)),
        "tree_scan_backward": (Kernel("summarise", 3, 40, 2, 1), Kernel("finish", 5, 48, 2, 2)),
        "selective": (Kernel("summarise", 1, 77, 1, 1), Kernel("finish", 2, 79, 1, 2), Kernel("output", 4, 59)),
        "selective_backward": (
            Kernel("summarise", 1, 77, 1, 1),
            Kernel("finish", 2, 79, 1, 2),
            Kernel("output", 7, 127),
            Kernel("summarise", 2, 87, 2, 1),
            Kernel("finish", 4, 95, 2, 2),
            Kernel("inputs", 6, 89),
            Kernel("products", 2, 10),
        ),
    },
)
AFTER = Design(
    lanes=4,
    blocks={1: 4, 2: 3},
    divides_rest=True,
    waits=3,
    kernels={
        "tree_scan": (Kernel("summarise", 2, 25, 1, 1), Kernel("finish", 3, 27, 1, 2)),
        "tree_scan_backward": (Kernel("summarise", 3, 33, 2, 1), Kernel("finish", 5, 44, 2, 2)),
        "selective": (Kernel("summarise", 1, 80, 1, 1), Kernel("finish", 2, 83, 1, 2), Kernel("output", 4, 59)),
        "selective_backward": (
            Kernel("summarise", 1, 80, 1, 1),
            Kernel("finish", 2, 83, 1, 2),
            Kernel("output", 7, 127),
            Kernel("summarise", 1, 80, 1, 1),
            Kernel("finish", 4.4, 267, 2, 2),
            Kernel("sums", 0.4, 1),
        ),
    },
)


def make_tree(shape: Shape, seed: int = 0) -> Tree:
    """The tree of a random image of this shape."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.fft.fftfreq(shape.height), torch.fft.rfftfreq(shape.width)
    frequency = torch.hypot(rows[:, None], columns).clamp(min=1 / shape.width)
    white = torch.randn(1, 16, shape.height, shape.width, generator=generator)
    smooth = torch.fft.irfft2(torch.fft.rfft2(white) / frequency, s=(shape.height, shape.width))
    return grid_tree(grid_edge_weight(smooth), shape.height, shape.width)


class Cut(NamedTuple):
    """Members of each piece of a tree, the longest first; number of critical vertices; upper bound on the members."""

    members: list[int]
    criticals: int
    most: int


def cut(tree: Tree) -> Cut:
    """Cut a tree as in ``pieces.cu``."""
    parent, order = (part[0].tolist() for part in tree)
    count, size = len(order), 16
    while size < 128 and size * size * 2 < count:
        size *= 2
    place = {vertex: i for i, vertex in enumerate(order)}
    above = [place[parent[vertex]] for vertex in order]
    below, multiples = [1] * count, [0] * count
    for i in range(count - 1, 0, -1):
        below[above[i]] += below[i]
        multiples[above[i]] = max(multiples[above[i]], -(-below[i] // size))
    is_critical = [i == 0 or 0 < multiples[i] < -(-below[i] // size) for i in range(count)]
    head, members = [0] * count, {}
    for i in range(1, count):
        head[i] = i if is_critical[above[i]] else head[above[i]]
        members[head[i]] = members.get(head[i], 0) + 1
    return Cut(sorted(members.values(), reverse=True), sum(is_critical), size + 1)


class Tile(NamedTuple):
    """A block's share of a tree: the members of some pieces."""

    members: list[int]

    @property
    def steps(self) -> int:
        """The members if all pieces were as long as the longest."""
        return max(self.members, default=0) * len(self.members)


def tile_begins(rows: int, total: int, divides_rest: bool) -> list[int]:
    """Where tiles of up to ``rows`` members begin, as in ``Tiling``; without ``divides_rest``, all are alike."""
    count = -(-total // rows)
    if count == 1 or not divides_rest:
        return list(range(0, total, -(-total // count)))
    full = count - 2
    rest = total - full * rows
    return [*(tile * rows for tile in range(full + 1)), total - (rest >> 1), total - (rest >> 2)]


def make_tiles(pieces: Cut, design: Design, streams: int) -> list[Tile]:
    """Make tiles as in ``choose_tiling``, for float32 in packs of 4."""
    row_bytes = (streams + 1) * design.lanes * 16 + 8
    total, room = sum(pieces.members), SHARED_BYTES - RESERVED_BYTES
    wished = max((room // design.blocks[streams] - RESERVED_BYTES) // row_bytes, 2 * pieces.most)
    begins = tile_begins(max(min(wished, room // row_bytes) - pieces.most, 1), total, design.divides_rest)
    tiles: list[list[int]] = [[] for _ in begins]
    slot = 0
    for members in pieces.members:
        tiles[bisect_right(begins, slot) - 1].append(members)
        slot += members
    return [Tile(members) for members in tiles]


def useful_share(tiles: Sequence[Tile]) -> float:
    """The mean length of the pieces of a tile over the longest, weighted with the steps of the tiles."""
    return sum(sum(tile.members) for tile in tiles) / sum(tile.steps for tile in tiles)


def resident_blocks(pieces: Cut, lanes: int, streams: int, blocks: int) -> int:
    """The resident blocks of a multiprocessor, as limited by its shared memory and by the intended number of blocks."""
    row_bytes = (streams + 1) * lanes * 16 + 8
    room = SHARED_BYTES - RESERVED_BYTES
    capacity = max((room // blocks - RESERVED_BYTES) // row_bytes, 2 * pieces.most)
    return min(blocks, SHARED_BYTES // (capacity * row_bytes + RESERVED_BYTES))


def seconds_of(kernel: Kernel, shape: Shape, pieces: Cut, design: Design) -> float:
    """The modelled time of a kernel, the longest of the three times."""
    rows = shape.batch * shape.height * shape.width
    times = [
        kernel.maps * rows * shape.channels * 4 / BANDWIDTH,
        kernel.instructions * rows * shape.channels / 32 / (PROCESSORS * ISSUE * CLOCK),
    ]
    if kernel.streams:
        blocks = design.blocks[kernel.streams]
        tiles = make_tiles(pieces, design, kernel.streams)
        groups = THREADS // design.lanes
        # If there are more pieces than groups, the others wait.
        cycles = sum(
            design.waits * MEMORY_CYCLES
            + kernel.walks * MEMBER_CYCLES * sum(tile.members[first] for first in range(0, len(tile.members), groups))
            for tile in tiles
        )
        columns = shape.batch * -(-shape.channels // (design.lanes * 4))
        places = PROCESSORS * resident_blocks(pieces, design.lanes, kernel.streams, blocks)
        times.append(max(columns * cycles / places, pieces.members[0] * MEMBER_CYCLES) / CLOCK)
    return max(times)


def seconds_of_join(streams: int, shape: Shape, pieces: Cut) -> float:
    """The modelled time of the join kernel: one warp per image and 32 channels visits pieces and critical vertices."""
    steps = len(pieces.members) + 3 * pieces.criticals
    warps = shape.batch * -(-shape.channels // 32)
    rounds = -(-warps // (PROCESSORS * 8))
    return rounds * streams * steps * CRITICAL_CYCLES / CLOCK


def seconds(operator: str, shape: Shape, pieces: Cut, design: Design) -> float:
    """The modelled time of an operator, the sum over its kernels."""
    kernels = design.kernels[operator]
    total = sum(seconds_of(kernel, shape, pieces, design) for kernel in kernels)
    total += sum(seconds_of_join(k.streams, shape, pieces) for k in kernels if k.name == "summarise")
    return total + len(kernels) * LAUNCH_CYCLES / CLOCK


def table(rows: Sequence[Sequence[object]]) -> str:
    """Format rows as a Markdown table."""
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in rows)


def main() -> None:
    """Print the modelled times."""
    trees: list[tuple[Shape, Cut]] = [(shape, cut(make_tree(shape))) for shape in SHAPES]
    for shape, pieces in trees:
        before, after = (useful_share(make_tiles(pieces, design, 1)) for design in (BEFORE, AFTER))
        mean = Tensor(pieces.members).mean().item()
        print(  # noqa: T201
            f"{shape.name}: {len(pieces.members)} pieces of {mean:.0f} (most {pieces.members[0]}), {pieces.criticals} "
            f"critical vertices; useful share of a tile's steps {before:.2f}, {after:.2f}"
        )
    rows = [["operator", *(f"{shape.name} {when}" for shape, _ in trees for when in ("before", "after"))]]
    for operator in BEFORE.kernels:
        times = [seconds(operator, shape, pieces, d) for shape, pieces in trees for d in (BEFORE, AFTER)]
        rows.append([operator, *(f"{1e3 * value:.2f} ms" for value in times)])
    print(table([rows[0], ["---"] * len(rows[0]), *rows[1:]]))  # noqa: T201


if __name__ == "__main__":
    main()
