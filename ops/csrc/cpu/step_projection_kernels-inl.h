// The projection of the low-rank step sizes, pre = dt_bias + dt dt_weight^T, which is the argument of the softplus, and
// its gradients. The rank is so low that these matrix products are fused with the steps that use them. Vertices are
// processed in tiles, so that the weight, which may exceed a cache, is read once per tile.

struct StepProjectionKernels : LayerNormKernels {
  // Vertices of a tile.
  static constexpr int64_t kTile = 16;
  // The vertices, and registers of channels or ranks, of a block of sums: as many as fit into registers.
  static constexpr int kTogether = 4, kRegisters = kVectorBytes == 64 ? 4 : 2;

  // Vertices first..first+count-1, their low-rank steps (count, rank), and rows of `pre` (count, channels).
  template <typename acc_t>
  struct Tile {
    int64_t first, count;
    const acc_t* steps;
    acc_t* rows;
  };

  // The size of a tile's scratch memory.
  static int64_t tile_size(int64_t channels, int64_t rank) {
    return kTile * (channels + rank);
  }

  // Calls run(tile) for vertices begin..end-1.
  template <typename stored_t, typename acc_t, typename Run>
  static void for_each_tile(const Selective<stored_t>& s, int64_t begin, int64_t end, acc_t* scratch, const Run& run) {
    acc_t* steps = scratch + kTile * s.channels;
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t count = std::min(kTile, end - first);
      for (int64_t i = 0; i < count; ++i) {
        for (int64_t r = 0; r < s.rank; ++r) {
          steps[i * s.rank + r] = Rounding::widen(s.dt[first + i][r]);
        }
      }
      const Tile<acc_t> tile{first, count, steps, scratch};
      project(s, tile);
      run(tile);
    }
  }

  // Calls visit(size, first) for groups of kGroup items, then for the other items one by one; `size` is a type.
  template <int kGroup, typename Visit>
  __attribute__((always_inline)) static void in_groups(int64_t count, const Visit& visit) {
    int64_t i = 0;
    for (; i + kGroup <= count; i += kGroup) {
      visit(std::integral_constant<int, kGroup>(), i);
    }
    for (; i < count; ++i) {
      visit(std::integral_constant<int, 1>(), i);
    }
  }

  // Calls visit(lanes, registers, channel) for blocks of channels; `registers`, their number, is a type.
  template <typename acc_t, typename Visit>
  __attribute__((always_inline)) static void in_blocks(int64_t channels, const Visit& visit) {
    using Lanes = Vector<acc_t>;
    constexpr int64_t kBlock = kRegisters * Lanes::kWidth;
    int64_t c = 0;
    for (; c + kBlock <= channels; c += kBlock) {
      visit(Lanes(), std::integral_constant<int, kRegisters>(), c);
    }
    for (; c + Lanes::kWidth <= channels; c += Lanes::kWidth) {
      visit(Lanes(), std::integral_constant<int, 1>(), c);
    }
    for (; c < channels; ++c) {
      visit(Single<acc_t>(), std::integral_constant<int, 1>(), c);
    }
  }

  template <typename stored_t, typename acc_t>
  static void project(const Selective<stored_t>& s, const Tile<acc_t>& tile) {
    in_blocks<acc_t>(s.channels, [&](auto lanes, auto registers, int64_t c) {
      in_groups<kTogether>(tile.count, [&](auto vertices, int64_t i) {
        add_products<decltype(lanes), decltype(vertices)::value, decltype(registers)::value>(
            s.rank,
            tile.steps + i * s.rank,
            s.rank,
            1,
            s.dt_weight + c,
            s.channels,
            s.dt_bias + c,
            0,
            tile.rows + i * s.channels + c,
            s.channels);
      });
    });
  }

  // to(i, j) = start(i, j) + sum over k < depth of factor(i, k) * row(k, j), for i < kRows and the channels j in
  // kVectors registers.
  template <typename Lanes, int kRows, int kVectors, typename acc_t>
  static void add_products(
      int64_t depth,
      const acc_t* factor,
      int64_t stride_i,
      int64_t stride_k,
      const acc_t* row,
      int64_t row_stride,
      const acc_t* start,
      int64_t start_stride,
      acc_t* to,
      int64_t to_stride) {
    typename Lanes::Values sums[kRows][kVectors], values[kVectors];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        Lanes::load(start + i * start_stride + j * Lanes::kWidth, sums[i][j]);
      }
    }
    for (int64_t k = 0; k < depth; ++k) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        Lanes::load(row + k * row_stride + j * Lanes::kWidth, values[j]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const acc_t f = factor[i * stride_i + k * stride_k];
#pragma GCC unroll 4
        for (int j = 0; j < kVectors; ++j) {
          sums[i][j] += f * values[j];
        }
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        Lanes::store(sums[i][j], to + i * to_stride + j * Lanes::kWidth);
      }
    }
  }

  // From the gradient of `pre` in the rows of a tile: writes that of dt and adds that of dt_weight.
  template <typename stored_t, typename acc_t>
  static void project_backward(
      const Selective<stored_t>& s, const Tile<acc_t>& tile, const SelectiveGradients<stored_t>& g) {
    in_groups<kRegisters>(s.rank, [&](auto ranks, int64_t r) {
      in_groups<kTogether>(tile.count, [&](auto vertices, int64_t i) {
        multiply_rows<decltype(vertices)::value, decltype(ranks)::value>(
            s.channels, tile.rows + i * s.channels, s.dt_weight + r * s.channels, [&](int a, int b, acc_t sum) {
              g.dt[tile.first + i + a][r + b] = Rounding::round<stored_t>(sum);
            });
      });
    });
    in_blocks<acc_t>(s.channels, [&](auto lanes, auto registers, int64_t c) {
      in_groups<kTogether>(s.rank, [&](auto ranks, int64_t r) {
        acc_t* grad_weight = g.dt_weight + r * s.channels + c;
        add_products<decltype(lanes), decltype(ranks)::value, decltype(registers)::value>(
            tile.count,
            tile.steps + r,
            1,
            s.rank,
            tile.rows + c,
            s.channels,
            grad_weight,
            s.channels,
            grad_weight,
            s.channels);
      });
    });
  }

  // Calls finish(i, j, sum) with the dot products of rows i < kX of x and rows j < kY of y.
  template <int kX, int kY, typename acc_t, typename Finish>
  static void multiply_rows(int64_t channels, const acc_t* x, const acc_t* y, const Finish& finish) {
    using Lanes = Vector<acc_t>;
    typename Lanes::Values sums[kX][kY] = {}, of_x[kX], of_y;
    int64_t c = 0;
    for (; c + Lanes::kWidth <= channels; c += Lanes::kWidth) {
#pragma GCC unroll 4
      for (int i = 0; i < kX; ++i) {
        Lanes::load(x + i * channels + c, of_x[i]);
      }
#pragma GCC unroll 4
      for (int j = 0; j < kY; ++j) {
        Lanes::load(y + j * channels + c, of_y);
#pragma GCC unroll 4
        for (int i = 0; i < kX; ++i) {
          sums[i][j] += of_x[i] * of_y;
        }
      }
    }
    for (int i = 0; i < kX; ++i) {
      for (int j = 0; j < kY; ++j) {
        acc_t sum = Lanes::sum(sums[i][j]);
        for (int64_t rest = c; rest < channels; ++rest) {
          sum += x[i * channels + rest] * y[j * channels + rest];
        }
        finish(i, j, sum);
      }
    }
  }
};
