// What lies around the scan in a tree state space layer: from the projections to decay and input, and from the scanned
// values through two layer norms and the gate. Rows as in scan_kernels-inl.h; all are `channels` wide.

struct SelectiveScanKernels : LayerNormKernels {
  // Channels whose sums over the rank stay in registers.
  static constexpr int kBlock = 64;

  // pre = bias + W t, the argument of the softplus. weight is (rank, channels), transposed.
  template <typename scalar_t>
  static void project(const Selective<scalar_t>& s, const scalar_t* t, scalar_t* __restrict pre) {
    int64_t first = 0;
    for (; first + kBlock <= s.channels; first += kBlock) {
      project_block<kBlock>(s, t, first, pre);
    }
    for (; first + kLanes <= s.channels; first += kLanes) {
      project_block<kLanes>(s, t, first, pre);
    }
    for (; first < s.channels; ++first) {
      project_block<1>(s, t, first, pre);
    }
  }

  template <int kWidth, typename scalar_t>
  static void project_block(const Selective<scalar_t>& s, const scalar_t* t, int64_t first, scalar_t* __restrict pre) {
    scalar_t sum[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      sum[i] = s.dt_bias[first + i];
    }
    for (int64_t r = 0; r < s.rank; ++r) {
      const scalar_t* __restrict weight = s.dt_weight + r * s.channels + first;
      const scalar_t factor = t[r];
      for (int i = 0; i < kWidth; ++i) {
        sum[i] += factor * weight[i];
      }
    }
    for (int i = 0; i < kWidth; ++i) {
      pre[first + i] = sum[i];
    }
  }

  // Decay a = exp(rate * delta), rate = -exp(A_log), and input delta * b * x for vertices begin..end-1. row: scratch.
  template <typename scalar_t>
  static void discretise(
      const Selective<scalar_t>& s,
      int64_t begin,
      int64_t end,
      const Rows<scalar_t>& decay,
      const Rows<scalar_t>& input,
      scalar_t* __restrict row) {
    for (int64_t v = begin; v < end; ++v) {
      project(s, s.dt[v], row);
      const scalar_t b = *s.b[v];
      const scalar_t* __restrict x = s.x[v];
      const scalar_t* __restrict rate = s.rate;
      scalar_t* __restrict a = decay[v];
      scalar_t* __restrict to = input[v];
#pragma GCC ivdep
      for (int64_t c = 0; c < s.channels; ++c) {
        const scalar_t delta = softplus(row[c], exponential_of_negative(-std::abs(row[c])));
        a[c] = exponential_of_negative(rate[c] * delta);
        to[c] = delta * b * x[c];
      }
    }
  }

  // mixed = LayerNorm_h(h) * c + Ds * x
  template <typename scalar_t>
  static void mix(
      const Selective<scalar_t>& s,
      int64_t v,
      const scalar_t* __restrict h,
      Moments<scalar_t> m,
      scalar_t* __restrict mixed) {
    const scalar_t factor = *s.c[v];
    const scalar_t* __restrict x = s.x[v];
    const scalar_t* __restrict weight = s.h_norm_weight;
    const scalar_t* __restrict bias = s.h_norm_bias;
    const scalar_t* __restrict skip = s.skip;
#pragma GCC ivdep
    for (int64_t c = 0; c < s.channels; ++c) {
      mixed[c] = ((h[c] - m.mean) * m.scale * weight[c] + bias[c]) * factor + skip[c] * x[c];
    }
  }

  // y = LayerNorm_out(mixed) * SiLU(gate) for vertices begin..end-1. row: scratch.
  template <typename scalar_t>
  static void read_out(
      const Selective<scalar_t>& s,
      int64_t begin,
      int64_t end,
      const Rows<const scalar_t>& h,
      const Rows<scalar_t>& y,
      scalar_t* __restrict row) {
    for (int64_t v = begin; v < end; ++v) {
      mix(s, v, h[v], moments(h[v], s.channels, s.eps), row);
      const Moments<scalar_t> m = moments<scalar_t>(row, s.channels, s.eps);
      const scalar_t* __restrict gate = s.gate[v];
      const scalar_t* __restrict weight = s.out_norm_weight;
      const scalar_t* __restrict bias = s.out_norm_bias;
      scalar_t* __restrict to = y[v];
#pragma GCC ivdep
      for (int64_t c = 0; c < s.channels; ++c) {
        to[c] = ((row[c] - m.mean) * m.scale * weight[c] + bias[c]) * gate[c] * sigmoid(gate[c]);
      }
    }
  }

  // Backwards through read_out: gradients of h and gate, of c, the share of x by the skip connection, and the sums for
  // the parameters. rows: scratch of 2 * channels.
  template <typename scalar_t>
  static void read_out_backward(
      const Selective<scalar_t>& s,
      int64_t begin,
      int64_t end,
      const Rows<const scalar_t>& h,
      const Rows<const scalar_t>& grad_y,
      const Rows<scalar_t>& grad_h,
      const SelectiveGradients<scalar_t>& g,
      scalar_t* __restrict rows) {
    constexpr scalar_t* kNone = nullptr;
    scalar_t* __restrict mixed = rows;
    scalar_t* __restrict grad = rows + s.channels;
    for (int64_t v = begin; v < end; ++v) {
      const scalar_t* __restrict of_vertex = h[v];
      const Moments<scalar_t> of_h = moments(of_vertex, s.channels, s.eps);
      mix(s, v, of_vertex, of_h, mixed);
      const Moments<scalar_t> of_mixed = moments<scalar_t>(mixed, s.channels, s.eps);
      const scalar_t* __restrict gate = s.gate[v];
      const scalar_t* __restrict grad_out = grad_y[v];
      const scalar_t* __restrict out_weight = s.out_norm_weight;
      const scalar_t* __restrict out_bias = s.out_norm_bias;
      scalar_t* __restrict grad_gate = g.gate[v];
#pragma GCC ivdep
      for (int64_t c = 0; c < s.channels; ++c) {
        const scalar_t normed = (mixed[c] - of_mixed.mean) * of_mixed.scale * out_weight[c] + out_bias[c];
        const scalar_t sig = sigmoid(gate[c]);
        grad_gate[c] = grad_out[c] * normed * sig * (1 + gate[c] * (1 - sig));
        grad[c] = grad_out[c] * gate[c] * sig;
      }
      norm_backward(
          mixed,
          of_mixed,
          s.out_norm_weight,
          s.channels,
          grad,
          kNone,
          scalar_t(1),
          grad,
          kNone,
          g.out_norm_weight,
          g.out_norm_bias);
      const scalar_t factor = *s.c[v];
      const scalar_t* __restrict x = s.x[v];
      const scalar_t* __restrict skip = s.skip;
      const scalar_t* __restrict h_weight = s.h_norm_weight;
      const scalar_t* __restrict h_bias = s.h_norm_bias;
      *g.c[v] = sum(s.channels, [&](int64_t c) {
        return grad[c] * ((of_vertex[c] - of_h.mean) * of_h.scale * h_weight[c] + h_bias[c]);
      });
      scalar_t* __restrict grad_x = g.x[v];
      scalar_t* __restrict grad_skip = g.skip;
      scalar_t* __restrict to = grad_h[v];
#pragma GCC ivdep
      for (int64_t c = 0; c < s.channels; ++c) {
        grad_x[c] = grad[c] * skip[c];
        grad_skip[c] += grad[c] * x[c];
        to[c] = grad[c] * factor;
      }
      norm_backward(
          of_vertex,
          of_h,
          s.h_norm_weight,
          s.channels,
          to,
          kNone,
          scalar_t(1),
          to,
          kNone,
          g.h_norm_weight,
          g.h_norm_bias);
    }
  }

  // Vertices whose gradients are added to that of the step size's weight in one go.
  static constexpr int64_t kTile = 16;

  // Backwards through discretise: from the gradients of input and decay to those of x (added), b, dt and the
  // parameters. rows: scratch of (kTile + 1) * channels.
  template <typename scalar_t>
  static void discretise_backward(
      const Selective<scalar_t>& s,
      int64_t begin,
      int64_t end,
      const Rows<const scalar_t>& decay,
      const Rows<const scalar_t>& grad_input,
      const Rows<const scalar_t>& grad_decay,
      const SelectiveGradients<scalar_t>& g,
      scalar_t* rows) {
    scalar_t* row = rows + kTile * s.channels;
    for (int64_t first = begin; first < end; first += kTile) {
      const int64_t count = std::min(kTile, end - first);
      for (int64_t i = 0; i < count; ++i) {
        const int64_t v = first + i;
        project(s, s.dt[v], row);
        step_backward(s, v, decay[v], grad_input[v], grad_decay[v], g, row, rows + i * s.channels);
      }
      project_backward(s, first, count, rows, g);
    }
  }

  // For one vertex: the gradients of x (added) and b, and that of the softplus's argument `pre`. pre becomes scratch.
  template <typename scalar_t>
  static void step_backward(
      const Selective<scalar_t>& s,
      int64_t v,
      const scalar_t* __restrict a,
      const scalar_t* __restrict from_input,
      const scalar_t* __restrict from_decay,
      const SelectiveGradients<scalar_t>& g,
      scalar_t* __restrict pre,
      scalar_t* __restrict grad_pre) {
    const scalar_t b = *s.b[v];
    const scalar_t* __restrict x = s.x[v];
    const scalar_t* __restrict rate = s.rate;
    scalar_t* __restrict grad_x = g.x[v];
    scalar_t* __restrict grad_rate = g.rate;
    scalar_t* __restrict grad_bias = g.dt_bias;
#pragma GCC ivdep
    for (int64_t c = 0; c < s.channels; ++c) {
      const scalar_t e = exponential_of_negative(-std::abs(pre[c]));
      const scalar_t delta = softplus(pre[c], e);
      const scalar_t through_input = from_input[c] * delta;
      const scalar_t through_decay = from_decay[c] * a[c];
      const scalar_t grad = (from_input[c] * b * x[c] + through_decay * rate[c]) * sigmoid(pre[c], e);
      grad_pre[c] = grad;
      grad_bias[c] += grad;
      grad_rate[c] += through_decay * delta;
      grad_x[c] += through_input * b;
      pre[c] = through_input * x[c];
    }
    *g.b[v] = sum(s.channels, [&](int64_t c) { return pre[c]; });
  }

  // Backwards through project for `count` vertices from `first` on, whose gradients are the first of `rows`.
  template <typename scalar_t>
  static void project_backward(
      const Selective<scalar_t>& s,
      int64_t first,
      int64_t count,
      const scalar_t* rows,
      const SelectiveGradients<scalar_t>& g) {
    for (int64_t r = 0; r < s.rank; ++r) {
      const scalar_t* weight = s.dt_weight + r * s.channels;
      scalar_t* __restrict grad_weight = g.dt_weight + r * s.channels;
      for (int64_t i = 0; i < count; ++i) {
        const scalar_t* grad = rows + i * s.channels;
        g.dt[first + i][r] = sum(s.channels, [&](int64_t c) { return grad[c] * weight[c]; });
      }
      int64_t c = 0;
      for (; c + kLanes <= s.channels; c += kLanes) {
        add_products<kLanes>(s, first, count, rows, r, c, grad_weight);
      }
      for (; c < s.channels; ++c) {
        add_products<1>(s, first, count, rows, r, c, grad_weight);
      }
    }
  }

  // Adds the products of gradients and steps to kWidth entries of the weight's gradient.
  template <int kWidth, typename scalar_t>
  static void add_products(
      const Selective<scalar_t>& s,
      int64_t first,
      int64_t count,
      const scalar_t* rows,
      int64_t r,
      int64_t c,
      scalar_t* __restrict grad_weight) {
    scalar_t total[kWidth];
    for (int i = 0; i < kWidth; ++i) {
      total[i] = grad_weight[c + i];
    }
    for (int64_t v = 0; v < count; ++v) {
      const scalar_t factor = s.dt[first + v][r];
      const scalar_t* grad = rows + v * s.channels + c;
      for (int i = 0; i < kWidth; ++i) {
        total[i] += factor * grad[i];
      }
    }
    for (int i = 0; i < kWidth; ++i) {
      grad_weight[c + i] = total[i];
    }
  }
};
