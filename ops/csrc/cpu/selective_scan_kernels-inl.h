// The row-wise steps before and after the scan of a tree state space layer: discretize computes decay and scan input,
// read_out the two layer norms and the gate. Rows are those of scan_kernels-inl.h, all `channels` wide. Activations and
// their gradients are stored as stored_t, everything else as acc_t.

struct SelectiveScanKernels : StepProjectionKernels {
  // decay = exp(rate * delta) and input = delta * b * x for vertices begin..end-1. scratch: tile_size() values.
  template <typename stored_t, typename acc_t>
  static void discretize(
      const Selective<stored_t>& s,
      int64_t begin,
      int64_t end,
      const Rows<acc_t>& decay,
      const Rows<acc_t>& input,
      acc_t* scratch) {
    for_each_tile(s, begin, end, scratch, [&](const Tile<acc_t>& tile) {
      for (int64_t i = 0; i < tile.count; ++i) {
        const int64_t v = tile.first + i;
        const acc_t b = Rounding::widen(*s.b[v]);
        const stored_t* __restrict x = s.x[v];
        const acc_t* __restrict rate = s.rate;
        const acc_t* __restrict pre = tile.rows + i * s.channels;
        acc_t* __restrict a = decay[v];
        acc_t* __restrict to = input[v];
#pragma GCC ivdep
        for (int64_t c = 0; c < s.channels; ++c) {
          const acc_t delta = softplus(pre[c], exponential_of_negative(-std::abs(pre[c])));
          a[c] = exponential_of_negative(rate[c] * delta);
          to[c] = delta * b * Rounding::widen(x[c]);
        }
      }
    });
  }

  // mixed = LayerNorm_h(h) * c + Ds * x
  template <typename stored_t, typename acc_t>
  static void mix(
      const Selective<stored_t>& s, int64_t v, const acc_t* __restrict h, Moments<acc_t> m, acc_t* __restrict mixed) {
    const acc_t factor = Rounding::widen(*s.c[v]);
    const stored_t* __restrict x = s.x[v];
    const acc_t* __restrict weight = s.h_norm_weight;
    const acc_t* __restrict bias = s.h_norm_bias;
    const acc_t* __restrict skip = s.skip;
#pragma GCC ivdep
    for (int64_t c = 0; c < s.channels; ++c) {
      mixed[c] = ((h[c] - m.mean) * m.scale * weight[c] + bias[c]) * factor + skip[c] * Rounding::widen(x[c]);
    }
  }

  // y = LayerNorm_out(mixed) * SiLU(gate) for vertices begin..end-1. row: scratch of `channels` values.
  template <typename stored_t, typename acc_t>
  static void read_out(
      const Selective<stored_t>& s,
      int64_t begin,
      int64_t end,
      const Rows<acc_t>& h,
      const Rows<stored_t>& y,
      acc_t* __restrict row) {
    for (int64_t v = begin; v < end; ++v) {
      mix<stored_t, acc_t>(s, v, h[v], moments<acc_t>(h[v], s.channels, s.eps), row);
      const Moments<acc_t> m = moments<acc_t>(row, s.channels, s.eps);
      const stored_t* __restrict gate = s.gate[v];
      const acc_t* __restrict weight = s.out_norm_weight;
      const acc_t* __restrict bias = s.out_norm_bias;
      stored_t* __restrict to = y[v];
#pragma GCC ivdep
      for (int64_t c = 0; c < s.channels; ++c) {
        const acc_t open = Rounding::widen(gate[c]);
        to[c] = Rounding::round<stored_t>(((row[c] - m.mean) * m.scale * weight[c] + bias[c]) * open * sigmoid(open));
      }
    }
  }

  // The backward pass of read_out: gradients of h, gate, c, of x through the skip connection, and sums for the
  // parameters. rows: scratch of 2 * channels values.
  template <typename stored_t, typename acc_t>
  static void read_out_backward(
      const Selective<stored_t>& s,
      int64_t begin,
      int64_t end,
      const Rows<acc_t>& h,
      const Rows<const stored_t>& grad_y,
      const Rows<acc_t>& grad_h,
      const SelectiveGradients<stored_t>& g,
      acc_t* __restrict rows) {
    constexpr acc_t* kNone = nullptr;
    acc_t* __restrict mixed = rows;
    acc_t* __restrict grad = rows + s.channels;
    for (int64_t v = begin; v < end; ++v) {
      const acc_t* __restrict of_vertex = h[v];
      const Moments<acc_t> of_h = moments<acc_t>(of_vertex, s.channels, s.eps);
      mix<stored_t, acc_t>(s, v, of_vertex, of_h, mixed);
      const Moments<acc_t> of_mixed = moments<acc_t>(mixed, s.channels, s.eps);
      const stored_t* __restrict gate = s.gate[v];
      const stored_t* __restrict grad_out = grad_y[v];
      const acc_t* __restrict out_weight = s.out_norm_weight;
      const acc_t* __restrict out_bias = s.out_norm_bias;
      stored_t* __restrict grad_gate = g.gate[v];
#pragma GCC ivdep
      for (int64_t c = 0; c < s.channels; ++c) {
        const acc_t normed = (mixed[c] - of_mixed.mean) * of_mixed.scale * out_weight[c] + out_bias[c];
        const acc_t open = Rounding::widen(gate[c]), sig = sigmoid(open), of_y = Rounding::widen(grad_out[c]);
        grad_gate[c] = Rounding::round<stored_t>(of_y * normed * sig * (1 + open * (1 - sig)));
        grad[c] = of_y * open * sig;
      }
      norm_backward(
          mixed,
          of_mixed,
          s.out_norm_weight,
          s.channels,
          grad,
          kNone,
          acc_t(1),
          grad,
          kNone,
          g.out_norm_weight,
          g.out_norm_bias);
      const acc_t of_c = sum_vectors<acc_t>(s.channels, [&](auto lanes, int64_t c) __attribute__((always_inline)) {
        typename decltype(lanes)::Values value, of_mixed, weight, bias;
        lanes.load(of_vertex + c, value);
        lanes.load(grad + c, of_mixed);
        lanes.load(s.h_norm_weight + c, weight);
        lanes.load(s.h_norm_bias + c, bias);
        return of_mixed * ((value - of_h.mean) * of_h.scale * weight + bias);
      });
      *g.c[v] = Rounding::round<stored_t>(of_c);
      const acc_t factor = Rounding::widen(*s.c[v]);
      const stored_t* __restrict x = s.x[v];
      const acc_t* __restrict skip = s.skip;
      acc_t* __restrict grad_x = g.x_by_skip[v];
      acc_t* __restrict grad_skip = g.skip;
      acc_t* __restrict to = grad_h[v];
#pragma GCC ivdep
      for (int64_t c = 0; c < s.channels; ++c) {
        grad_x[c] = grad[c] * skip[c];
        grad_skip[c] += grad[c] * Rounding::widen(x[c]);
        to[c] = grad[c] * factor;
      }
      norm_backward(
          of_vertex, of_h, s.h_norm_weight, s.channels, to, kNone, acc_t(1), to, kNone, g.h_norm_weight, g.h_norm_bias);
    }
  }

  // The backward pass of discretize: from the gradients of input and decay to those of x (plus x_by_skip), b, dt and
  // the parameters. scratch: tile_size() + channels values.
  template <typename stored_t, typename acc_t>
  static void discretize_backward(
      const Selective<stored_t>& s,
      int64_t begin,
      int64_t end,
      const Rows<acc_t>& decay,
      const Rows<acc_t>& grad_input,
      const Rows<acc_t>& grad_decay,
      const SelectiveGradients<stored_t>& g,
      acc_t* scratch) {
    for_each_tile(s, begin, end, scratch + s.channels, [&](const Tile<acc_t>& tile) {
      for (int64_t i = 0; i < tile.count; ++i) {
        const int64_t v = tile.first + i;
        step_backward<stored_t, acc_t>(
            s, v, decay[v], grad_input[v], grad_decay[v], g, tile.rows + i * s.channels, scratch);
      }
      project_backward(s, tile, g);
    });
  }

  // One vertex: writes the gradients of x and b, and overwrites `pre` with its gradient. row: scratch.
  template <typename stored_t, typename acc_t>
  static void step_backward(
      const Selective<stored_t>& s,
      int64_t v,
      const acc_t* __restrict a,
      const acc_t* __restrict from_input,
      const acc_t* __restrict from_decay,
      const SelectiveGradients<stored_t>& g,
      acc_t* __restrict pre,
      acc_t* __restrict row) {
    const acc_t b = Rounding::widen(*s.b[v]);
    const stored_t* __restrict x = s.x[v];
    const acc_t* __restrict rate = s.rate;
    const acc_t* by_skip = g.x_by_skip[v];  // may alias grad_x
    stored_t* grad_x = g.x[v];
    acc_t* __restrict grad_rate = g.rate;
    acc_t* __restrict grad_bias = g.dt_bias;
#pragma GCC ivdep
    for (int64_t c = 0; c < s.channels; ++c) {
      const acc_t x_c = Rounding::widen(x[c]);
      const acc_t e = exponential_of_negative(-std::abs(pre[c]));
      const acc_t delta = softplus(pre[c], e);
      const acc_t through_input = from_input[c] * delta;
      const acc_t through_decay = from_decay[c] * a[c];
      const acc_t grad = (from_input[c] * b * x_c + through_decay * rate[c]) * sigmoid(pre[c], e);
      pre[c] = grad;
      grad_bias[c] += grad;
      grad_rate[c] += through_decay * delta;
      grad_x[c] = Rounding::round<stored_t>(by_skip[c] + through_input * b);
      row[c] = through_input * x_c;
    }
    const acc_t of_b = sum_vectors<acc_t>(s.channels, [&](auto lanes, int64_t c) __attribute__((always_inline)) {
      typename decltype(lanes)::Values value;
      lanes.load(row + c, value);
      return value;
    });
    *g.b[v] = Rounding::round<stored_t>(of_b);
  }
};
