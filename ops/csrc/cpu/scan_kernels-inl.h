// Scans of a range of channels of one image. Included once for each instruction set, inside its namespace.
//
// A row holds the channels of one vertex. Channels are not split into blocks that fit a cache, because memory access is
// much faster in long rows. The sum of a vertex is its input until a child adds to it (`has_sum`), so that no pass is
// needed to copy inputs.
//
// Inputs and results are stored as stored_t; sums are computed and stored as acc_t. If the types are the same, the sums
// are stored in the results; otherwise they have rows of their own, and results are rounded when they are written.

struct ScanKernels {
  // How many vertices ahead rows are prefetched: the order is known, but rows are scattered in memory.
  static constexpr int64_t kAhead = 6;

  template <typename stored_t>
  static void prefetch(const Rows<stored_t>& rows, int64_t v, int64_t width) {
    const char* row = reinterpret_cast<const char*>(rows[v]);
    for (int64_t byte = 0; byte < width * static_cast<int64_t>(sizeof(stored_t)); byte += 64) {
      __builtin_prefetch(row + byte);
    }
  }

  template <typename acc_t>
  static const acc_t* select(bool first, const acc_t* a, const acc_t* b) {
    return first ? a : b;
  }

  // Calls use(row) with row a if `first`, otherwise with row b.
  template <typename first_t, typename second_t, typename Use>
  __attribute__((always_inline)) static void with_either(
      bool first, const first_t* a, const second_t* b, const Use& use) {
    if constexpr (std::is_same_v<first_t, second_t>) {
      use(select(first, a, b));
    } else if (first) {
      use(a);
    } else {
      use(b);
    }
  }

  // Calls use(row of x, row of y) with the sums of a vertex, or with its inputs if it has no sums yet.
  template <typename acc_t, typename stored_t, typename Use>
  __attribute__((always_inline)) static void with_both(
      bool has_sum,
      int64_t v,
      const Rows<acc_t>& x_sums,
      const Rows<const stored_t>& x,
      const Rows<acc_t>& y_sums,
      const Rows<const stored_t>& y,
      const Use& use) {
    if constexpr (std::is_same_v<acc_t, stored_t>) {
      use(select<acc_t>(has_sum, x_sums[v], x[v]), select<acc_t>(has_sum, y_sums[v], y[v]));
    } else if (has_sum) {
      use(x_sums[v], y_sums[v]);
    } else {
      use(x[v], y[v]);
    }
  }

  // Copies a row and converts its type.
  template <typename from_t, typename to_t>
  static void copy_row(const from_t* from, int64_t width, to_t* to) {
#pragma GCC ivdep
    for (int64_t c = 0; c < width; ++c) {
      to[c] = Rounding::round<to_t>(Rounding::widen(from[c]));
    }
  }

  // to = above + a * own
  template <typename decay_t, typename own_t, typename above_t, typename acc_t>
  static void add_child(int64_t width, const decay_t* a, const own_t* own, const above_t* above, acc_t* to) {
#pragma GCC ivdep
    for (int64_t c = 0; c < width; ++c) {
      to[c] = Rounding::widen(above[c]) + Rounding::widen(a[c]) * Rounding::widen(own[c]);
    }
  }

  // From the leaves to the root: u_p = x_p + sum over children v of a_v u_v, into the rows of sums.
  template <typename decay_t, typename stored_t, typename acc_t>
  static void up(
      const Tree& tree,
      int64_t width,
      const Rows<const decay_t>& decay,
      const Rows<const stored_t>& x,
      const Rows<acc_t>& sums,
      uint8_t* has_sum) {
    for (int64_t i = tree.vertices - 1; i > 0; --i) {
      if (i > kAhead) {
        prefetch(decay, tree.order[i - kAhead], width);
        prefetch(x, tree.order[i - kAhead], width);
      }
      const int64_t v = tree.order[i], p = tree.parent[v];
      with_either(has_sum[v], sums[v], x[v], [&](const auto* own) {
        with_either(
            has_sum[p], sums[p], x[p], [&](const auto* above) { add_child(width, decay[v], own, above, sums[p]); });
      });
      has_sum[p] = 1;
    }
  }

  // The same for two inputs at once.
  template <typename stored_t, typename acc_t>
  static void up_both(
      const Tree& tree,
      int64_t width,
      const Rows<const stored_t>& decay,
      const Rows<const stored_t>& x,
      const Rows<acc_t>& x_sums,
      const Rows<const stored_t>& y,
      const Rows<acc_t>& y_sums,
      uint8_t* has_sum) {
    for (int64_t i = tree.vertices - 1; i > 0; --i) {
      if (i > kAhead) {
        prefetch(decay, tree.order[i - kAhead], width);
        prefetch(x, tree.order[i - kAhead], width);
        prefetch(y, tree.order[i - kAhead], width);
      }
      const int64_t v = tree.order[i], p = tree.parent[v];
      const stored_t* a = decay[v];
      acc_t* x_to = x_sums[p];
      acc_t* y_to = y_sums[p];
      with_both(has_sum[v], v, x_sums, x, y_sums, y, [&](const auto* x_own, const auto* y_own) {
        with_both(has_sum[p], p, x_sums, x, y_sums, y, [&](const auto* x_above, const auto* y_above) {
#pragma GCC ivdep
          for (int64_t c = 0; c < width; ++c) {
            const acc_t factor = Rounding::widen(a[c]);
            x_to[c] = Rounding::widen(x_above[c]) + factor * Rounding::widen(x_own[c]);
            y_to[c] = Rounding::widen(y_above[c]) + factor * Rounding::widen(y_own[c]);
          }
        });
      });
      has_sum[p] = 1;
    }
  }

  // Completes the results of an up pass: copies the inputs of leaves, and converts the sums unless they are stored in
  // the results already.
  template <typename stored_t, typename acc_t>
  static void finish_sums(
      const Tree& tree,
      int64_t width,
      const Rows<const stored_t>& x,
      const Rows<acc_t>& sums,
      const Rows<stored_t>& results,
      const uint8_t* has_sum) {
    for (int64_t v = 0; v < tree.vertices; ++v) {
      if (!has_sum[v]) {
        std::copy(x[v], x[v] + width, results[v]);
      } else if constexpr (!std::is_same_v<stored_t, acc_t>) {
        copy_row(sums[v], width, results[v]);
      }
    }
  }

  // From the root to the leaves, in place: h_v = u_v + a_v (h_p - a_v u_v) after an up pass, otherwise x_v + a_v h_p.
  template <bool kAfterUp, typename decay_t, typename stored_t, typename acc_t>
  static void down(
      const Tree& tree,
      int64_t width,
      const Rows<const decay_t>& decay,
      const Rows<const stored_t>& x,
      const Rows<acc_t>& h,
      const Rows<stored_t>& results,
      const uint8_t* has_sum) {
    const int64_t root = tree.order[0];
    with_either(has_sum[root], h[root], x[root], [&](const auto* own) {
      copy_row(own, width, results[root]);
      copy_row(own, width, h[root]);
    });
    for (int64_t i = 1; i < tree.vertices; ++i) {
      if (i + kAhead < tree.vertices) {
        prefetch(decay, tree.order[i + kAhead], width);
        prefetch(x, tree.order[i + kAhead], width);
      }
      const int64_t v = tree.order[i];
      const decay_t* a = decay[v];
      const acc_t* above = h[tree.parent[v]];
      acc_t* to = h[v];
      stored_t* result = results[v];
      with_either(has_sum[v], h[v], x[v], [&](const auto* own) {
#pragma GCC ivdep
        for (int64_t c = 0; c < width; ++c) {
          const acc_t decay_c = Rounding::widen(a[c]), own_c = Rounding::widen(own[c]);
          const acc_t arriving = kAfterUp ? above[c] - decay_c * own_c : above[c];
          const acc_t value = own_c + decay_c * arriving;
          to[c] = value;
          if constexpr (!std::is_same_v<stored_t, acc_t>) {
            result[c] = Rounding::round<stored_t>(value);
          }
        }
      });
    }
  }

  // sums: rows of acc_t; those of h if stored_t is acc_t.
  template <typename decay_t, typename stored_t, typename acc_t>
  static void scan(
      const Tree& tree,
      int64_t width,
      Propagation propagation,
      const Rows<const decay_t>& decay,
      const Rows<const stored_t>& x,
      const Rows<acc_t>& sums,
      const Rows<stored_t>& h,
      uint8_t* has_sum) {
    switch (propagation) {
      case Propagation::kAll:
        up(tree, width, decay, x, sums, has_sum);
        return down<true>(tree, width, decay, x, sums, h, has_sum);
      case Propagation::kUp:
        up(tree, width, decay, x, sums, has_sum);
        return finish_sums(tree, width, x, sums, h, has_sum);
      case Propagation::kDown:
        return down<false>(tree, width, decay, x, sums, h, has_sum);
    }
  }

  // From the root to the leaves, given the up sums u of x and e of grad_h: grad_x_v = g_v = e_v + a_v (g_p - a_v e_v),
  // which overwrites e, and grad_decay_v = e_v (h_p - a_v u_v) + u_v (g_p - a_v e_v), which may overwrite u.
  template <typename stored_t, typename acc_t>
  static void down_all_backward(
      const Tree& tree,
      int64_t width,
      const Rows<const stored_t>& grad_h,
      const Rows<const stored_t>& decay,
      const Rows<const stored_t>& x,
      const ScanSums<acc_t>& sums,
      const Rows<stored_t>& grad_x,
      const Rows<stored_t>& grad_decay,
      const uint8_t* has_sum) {
    const int64_t root = tree.order[0];
    with_either(has_sum[root], sums.x[root], x[root], [&](const auto* u) { copy_row(u, width, sums.h[root]); });
    with_either(has_sum[root], sums.grad[root], grad_h[root], [&](const auto* e) {
      copy_row(e, width, grad_x[root]);
      copy_row(e, width, sums.grad[root]);
    });
    for (int64_t i = 1; i < tree.vertices; ++i) {
      if (i + kAhead < tree.vertices) {
        prefetch(decay, tree.order[i + kAhead], width);
        prefetch(x, tree.order[i + kAhead], width);
        prefetch(grad_h, tree.order[i + kAhead], width);
      }
      const int64_t v = tree.order[i], p = tree.parent[v];
      const stored_t* a = decay[v];
      const acc_t* h_above = sums.h[p];
      const acc_t* g_above = sums.grad[p];
      acc_t* h_to = sums.h[v];
      acc_t* g_to = sums.grad[v];
      stored_t* x_to = grad_x[v];
      stored_t* decay_to = grad_decay[v];
      with_both(has_sum[v], v, sums.x, x, sums.grad, grad_h, [&](const auto* u, const auto* e) {
#pragma GCC ivdep
        for (int64_t c = 0; c < width; ++c) {
          const acc_t a_c = Rounding::widen(a[c]), u_c = Rounding::widen(u[c]), e_c = Rounding::widen(e[c]);
          const acc_t h_arriving = h_above[c] - a_c * u_c;
          const acc_t g_arriving = g_above[c] - a_c * e_c;
          const acc_t g = e_c + a_c * g_arriving;
          h_to[c] = u_c + a_c * h_arriving;
          g_to[c] = g;
          if constexpr (!std::is_same_v<stored_t, acc_t>) {
            x_to[c] = Rounding::round<stored_t>(g);
          }
          decay_to[c] = Rounding::round<stored_t>(e_c * h_arriving + u_c * g_arriving);
        }
      });
    }
    std::fill(grad_decay[root], grad_decay[root] + width, stored_t(0));
  }

  // The backward pass of an up or a down pass alone, which is a pass in the other direction: z is the down pass of y,
  // `below` (with `has_sum`) the up pass of x, and grad_decay_v = below_v * z_p.
  template <typename stored_t, typename acc_t>
  static void down_one_backward(
      const Tree& tree,
      int64_t width,
      const Rows<const stored_t>& decay,
      const Rows<const stored_t>& x,
      const Rows<const acc_t>& below,
      const Rows<const stored_t>& y,
      const Rows<acc_t>& z,
      const Rows<stored_t>& grad_decay,
      const uint8_t* has_sum) {
    const int64_t root = tree.order[0];
    copy_row(y[root], width, z[root]);
    for (int64_t i = 1; i < tree.vertices; ++i) {
      const int64_t v = tree.order[i];
      const stored_t* a = decay[v];
      const stored_t* from = y[v];
      const acc_t* above = z[tree.parent[v]];
      acc_t* to = z[v];
      stored_t* decay_to = grad_decay[v];
      with_either(has_sum[v], below[v], x[v], [&](const auto* own) {
#pragma GCC ivdep
        for (int64_t c = 0; c < width; ++c) {
          decay_to[c] = Rounding::round<stored_t>(Rounding::widen(own[c]) * above[c]);
          to[c] = Rounding::widen(from[c]) + Rounding::widen(a[c]) * above[c];
        }
      });
    }
    std::fill(grad_decay[root], grad_decay[root] + width, stored_t(0));
  }

  // sums: if stored_t is acc_t, sums.x and sums.grad are the rows of grad_decay and grad_x.
  template <typename stored_t, typename acc_t>
  static void scan_backward(
      const Tree& tree,
      int64_t width,
      Propagation propagation,
      const Rows<const stored_t>& grad_h,
      const Rows<const stored_t>& decay,
      const Rows<const stored_t>& x,
      const ScanSums<acc_t>& sums,
      const Rows<stored_t>& grad_x,
      const Rows<stored_t>& grad_decay,
      uint8_t* has_sum) {
    switch (propagation) {
      case Propagation::kAll:
        up_both(tree, width, decay, x, sums.x, grad_h, sums.grad, has_sum);
        return down_all_backward(tree, width, grad_h, decay, x, sums, grad_x, grad_decay, has_sum);
      case Propagation::kUp:
        up(tree, width, decay, x, sums.x, has_sum);
        down_one_backward<stored_t, acc_t>(tree, width, decay, x, sums.x, grad_h, sums.grad, grad_decay, has_sum);
        std::fill(has_sum, has_sum + tree.vertices, uint8_t(1));
        return finish_sums(tree, width, grad_h, sums.grad, grad_x, has_sum);
      case Propagation::kDown:
        up(tree, width, decay, grad_h, sums.grad, has_sum);
        down_one_backward<stored_t, acc_t>(tree, width, decay, grad_h, sums.grad, x, sums.h, grad_decay, has_sum);
        return finish_sums(tree, width, grad_h, sums.grad, grad_x, has_sum);
    }
  }

  // ---- for a backward pass that needs h between its steps: uses less memory and computes no sum twice ----

  // Computes h and overwrites x with the sums u of the up pass, if there is one: the backward scan needs them.
  template <typename scalar_t>
  static void scan_keeping_sums(
      const Tree& tree,
      int64_t width,
      Propagation propagation,
      const Rows<const scalar_t>& decay,
      const Rows<scalar_t>& x,
      const Rows<scalar_t>& h,
      uint8_t* flags) {
    if (propagation != Propagation::kDown) {
      std::fill(flags, flags + tree.vertices, uint8_t(1));
      up<scalar_t, scalar_t>(tree, width, decay, x, x, flags);
    }
    std::fill(flags, flags + tree.vertices, uint8_t(0));
    switch (propagation) {
      case Propagation::kAll:
        return down<true, scalar_t, scalar_t>(tree, width, decay, x, h, h, flags);
      case Propagation::kUp:
        return finish_sums<scalar_t>(tree, width, x, h, h, flags);
      case Propagation::kDown:
        return down<false, scalar_t, scalar_t>(tree, width, decay, x, h, h, flags);
    }
  }

  // The backward scan after scan_keeping_sums: overwrites grad, the gradient of h, with that of x, and the sums with
  // the gradient of the decay.
  template <typename scalar_t>
  static void scan_backward_from_sums(
      const Tree& tree,
      int64_t width,
      Propagation propagation,
      const Rows<const scalar_t>& decay,
      const Rows<scalar_t>& sums,
      const Rows<const scalar_t>& h,
      const Rows<scalar_t>& grad,
      uint8_t* flags) {
    std::fill(flags, flags + tree.vertices, uint8_t(1));
    switch (propagation) {
      case Propagation::kAll:
        up<scalar_t, scalar_t>(tree, width, decay, grad, grad, flags);
        return down_all_backward_from_sums<scalar_t>(tree, width, decay, sums, h, grad);
      case Propagation::kUp:
        down<false, scalar_t, scalar_t>(tree, width, decay, grad, grad, grad, flags);
        return multiply_by_parent<scalar_t>(tree, width, sums, grad, sums);
      case Propagation::kDown:
        up<scalar_t, scalar_t>(tree, width, decay, grad, grad, flags);
        return multiply_by_parent<scalar_t>(tree, width, grad, h, sums);
    }
  }

  // down_all_backward in place: `sums` holds u, then the gradient of the decay; `grad` holds e, then g.
  template <typename scalar_t>
  static void down_all_backward_from_sums(
      const Tree& tree,
      int64_t width,
      const Rows<const scalar_t>& decay,
      const Rows<scalar_t>& sums,
      const Rows<const scalar_t>& h,
      const Rows<scalar_t>& grad) {
    for (int64_t i = 1; i < tree.vertices; ++i) {
      if (i + kAhead < tree.vertices) {
        prefetch(decay, tree.order[i + kAhead], width);
        prefetch(sums, tree.order[i + kAhead], width);
        prefetch(grad, tree.order[i + kAhead], width);
      }
      const int64_t v = tree.order[i], p = tree.parent[v];
      const scalar_t* a = decay[v];
      const scalar_t* h_above = h[p];
      const scalar_t* g_above = grad[p];
      scalar_t* u = sums[v];
      scalar_t* e = grad[v];
#pragma GCC ivdep
      for (int64_t c = 0; c < width; ++c) {
        const scalar_t u_c = u[c], e_c = e[c];
        const scalar_t g_arriving = g_above[c] - a[c] * e_c;
        u[c] = e_c * (h_above[c] - a[c] * u_c) + u_c * g_arriving;
        e[c] = e_c + a[c] * g_arriving;
      }
    }
    const int64_t root = tree.order[0];
    std::fill(sums[root], sums[root] + width, scalar_t(0));
  }

  // to_v = own_v * above_p; 0 for the root.
  template <typename scalar_t>
  static void multiply_by_parent(
      const Tree& tree,
      int64_t width,
      const Rows<const scalar_t>& own,
      const Rows<const scalar_t>& above,
      const Rows<scalar_t>& to) {
    for (int64_t i = 1; i < tree.vertices; ++i) {
      const int64_t v = tree.order[i];
      const scalar_t* of_parent = above[tree.parent[v]];
      const scalar_t* of_vertex = own[v];
      scalar_t* product = to[v];
#pragma GCC ivdep
      for (int64_t c = 0; c < width; ++c) {
        product[c] = of_vertex[c] * of_parent[c];
      }
    }
    const int64_t root = tree.order[0];
    std::fill(to[root], to[root] + width, scalar_t(0));
  }
};
