// Scans of one image over some of its channels. Included once for each instruction set, inside its namespace.
//
// A row holds the channels of one vertex. The channels are not cut into narrow blocks that fit a cache: the memory
// system follows long rows so much better that this gains more. Sums are kept where the results go. A row of sums does
// not exist until a child adds to it; until then the vertex's sum is its input (`has_sum`), so no pass is spent on
// copying.

struct ScanKernels {
  // How many vertices ahead of its use a row is asked for: the order is known, its rows lie anywhere.
  static constexpr int64_t kAhead = 6;

  template <typename scalar_t>
  static void prefetch(const Rows<const scalar_t>& rows, int64_t v, int64_t width) {
    const char* row = reinterpret_cast<const char*>(rows[v]);
    for (int64_t byte = 0; byte < width * static_cast<int64_t>(sizeof(scalar_t)); byte += 64) {
      __builtin_prefetch(row + byte);
    }
  }

  template <typename scalar_t>
  static const scalar_t* select(bool first, const scalar_t* a, const scalar_t* b) {
    return first ? a : b;
  }

  // Leaves to root: u_p = x_p + sum of a_v u_v over the children v, into the rows of sums.
  template <typename scalar_t>
  static void up(
      const Tree& tree,
      int64_t width,
      const Rows<const scalar_t>& decay,
      const Rows<const scalar_t>& x,
      const Rows<scalar_t>& sums,
      uint8_t* has_sum) {
    for (int64_t i = tree.vertices - 1; i > 0; --i) {
      if (i > kAhead) {
        prefetch(decay, tree.order[i - kAhead], width);
        prefetch(x, tree.order[i - kAhead], width);
      }
      const int64_t v = tree.order[i], p = tree.parent[v];
      const scalar_t* a = decay[v];
      const scalar_t* own = select<scalar_t>(has_sum[v], sums[v], x[v]);
      const scalar_t* above = select<scalar_t>(has_sum[p], sums[p], x[p]);
      scalar_t* to = sums[p];
#pragma GCC ivdep
      for (int64_t c = 0; c < width; ++c) {
        to[c] = above[c] + a[c] * own[c];
      }
      has_sum[p] = 1;
    }
  }

  // The same for two inputs at once.
  template <typename scalar_t>
  static void up_both(
      const Tree& tree,
      int64_t width,
      const Rows<const scalar_t>& decay,
      const Rows<const scalar_t>& x,
      const Rows<scalar_t>& x_sums,
      const Rows<const scalar_t>& y,
      const Rows<scalar_t>& y_sums,
      uint8_t* has_sum) {
    for (int64_t i = tree.vertices - 1; i > 0; --i) {
      if (i > kAhead) {
        prefetch(decay, tree.order[i - kAhead], width);
        prefetch(x, tree.order[i - kAhead], width);
        prefetch(y, tree.order[i - kAhead], width);
      }
      const int64_t v = tree.order[i], p = tree.parent[v];
      const scalar_t* a = decay[v];
      const scalar_t* x_own = select<scalar_t>(has_sum[v], x_sums[v], x[v]);
      const scalar_t* x_above = select<scalar_t>(has_sum[p], x_sums[p], x[p]);
      const scalar_t* y_own = select<scalar_t>(has_sum[v], y_sums[v], y[v]);
      const scalar_t* y_above = select<scalar_t>(has_sum[p], y_sums[p], y[p]);
      scalar_t* x_to = x_sums[p];
      scalar_t* y_to = y_sums[p];
#pragma GCC ivdep
      for (int64_t c = 0; c < width; ++c) {
        x_to[c] = x_above[c] + a[c] * x_own[c];
        y_to[c] = y_above[c] + a[c] * y_own[c];
      }
      has_sum[p] = 1;
    }
  }

  // Vertices without children, which no pass up has written: their sums are their inputs.
  template <typename scalar_t>
  static void copy_leaves(
      const Tree& tree,
      int64_t width,
      const Rows<const scalar_t>& x,
      const Rows<scalar_t>& sums,
      const uint8_t* has_sum) {
    for (int64_t v = 0; v < tree.vertices; ++v) {
      if (!has_sum[v]) {
        std::copy(x[v], x[v] + width, sums[v]);
      }
    }
  }

  // Root to leaves, in place of the sums: h_v = u_v + a_v (h_p - a_v u_v) after a pass up, else x_v + a_v h_p.
  template <bool kAfterUp, typename scalar_t>
  static void down(
      const Tree& tree,
      int64_t width,
      const Rows<const scalar_t>& decay,
      const Rows<const scalar_t>& x,
      const Rows<scalar_t>& h,
      const uint8_t* has_sum) {
    const int64_t root = tree.order[0];
    if (!has_sum[root]) {
      std::copy(x[root], x[root] + width, h[root]);
    }
    for (int64_t i = 1; i < tree.vertices; ++i) {
      if (i + kAhead < tree.vertices) {
        prefetch(decay, tree.order[i + kAhead], width);
        prefetch(x, tree.order[i + kAhead], width);
      }
      const int64_t v = tree.order[i];
      const scalar_t* a = decay[v];
      const scalar_t* own = select<scalar_t>(has_sum[v], h[v], x[v]);
      const scalar_t* above = h[tree.parent[v]];
      scalar_t* to = h[v];
#pragma GCC ivdep
      for (int64_t c = 0; c < width; ++c) {
        const scalar_t arriving = kAfterUp ? above[c] - a[c] * own[c] : above[c];
        to[c] = own[c] + a[c] * arriving;
      }
    }
  }

  template <typename scalar_t>
  static void scan(
      const Tree& tree,
      int64_t width,
      Propagation propagation,
      const Rows<const scalar_t>& decay,
      const Rows<const scalar_t>& x,
      const Rows<scalar_t>& h,
      uint8_t* has_sum) {
    switch (propagation) {
      case Propagation::kAll:
        up(tree, width, decay, x, h, has_sum);
        return down<true>(tree, width, decay, x, h, has_sum);
      case Propagation::kUp:
        up(tree, width, decay, x, h, has_sum);
        return copy_leaves(tree, width, x, h, has_sum);
      case Propagation::kDown:
        return down<false>(tree, width, decay, x, h, has_sum);
    }
  }

  // Root to leaves, after u and e, the sums of x and grad_h, have gone up into grad_decay and grad_x:
  // grad_x_v = g_v, the pass down of e, and grad_decay_v = e_v (h_p - a_v u_v) + u_v (g_p - a_v e_v).
  template <typename scalar_t>
  static void down_all_backward(
      const Tree& tree,
      int64_t width,
      const Rows<const scalar_t>& grad_h,
      const Rows<const scalar_t>& decay,
      const Rows<const scalar_t>& x,
      const Rows<scalar_t>& grad_x,
      const Rows<scalar_t>& grad_decay,
      const Rows<scalar_t>& h,
      const uint8_t* has_sum) {
    const int64_t root = tree.order[0];
    const scalar_t* u_root = select<scalar_t>(has_sum[root], grad_decay[root], x[root]);
    const scalar_t* e_root = select<scalar_t>(has_sum[root], grad_x[root], grad_h[root]);
    std::copy(u_root, u_root + width, h[root]);
    std::copy(e_root, e_root + width, grad_x[root]);
    for (int64_t i = 1; i < tree.vertices; ++i) {
      if (i + kAhead < tree.vertices) {
        prefetch(decay, tree.order[i + kAhead], width);
        prefetch(x, tree.order[i + kAhead], width);
        prefetch(grad_h, tree.order[i + kAhead], width);
      }
      const int64_t v = tree.order[i], p = tree.parent[v];
      const scalar_t* a = decay[v];
      const scalar_t* u = select<scalar_t>(has_sum[v], grad_decay[v], x[v]);
      const scalar_t* e = select<scalar_t>(has_sum[v], grad_x[v], grad_h[v]);
      const scalar_t* h_above = h[p];
      const scalar_t* g_above = grad_x[p];
      scalar_t* h_to = h[v];
      scalar_t* g_to = grad_x[v];
      scalar_t* decay_to = grad_decay[v];
#pragma GCC ivdep
      for (int64_t c = 0; c < width; ++c) {
        const scalar_t u_c = u[c], e_c = e[c];
        const scalar_t h_arriving = h_above[c] - a[c] * u_c;
        const scalar_t g_arriving = g_above[c] - a[c] * e_c;
        h_to[c] = u_c + a[c] * h_arriving;
        g_to[c] = e_c + a[c] * g_arriving;
        decay_to[c] = e_c * h_arriving + u_c * g_arriving;
      }
    }
    std::fill(grad_decay[root], grad_decay[root] + width, scalar_t(0));
  }

  // One pass alone is differentiated by the other one: grad_decay_v = (what came up)_v * (what goes down)_p. Here `y`
  // goes down into `z`; `below` (and `has_sum`) hold what has come up from `x`.
  template <typename scalar_t>
  static void down_one_backward(
      const Tree& tree,
      int64_t width,
      const Rows<const scalar_t>& decay,
      const Rows<const scalar_t>& x,
      const Rows<const scalar_t>& below,
      const Rows<const scalar_t>& y,
      const Rows<scalar_t>& z,
      const Rows<scalar_t>& grad_decay,
      const uint8_t* has_sum) {
    const int64_t root = tree.order[0];
    std::copy(y[root], y[root] + width, z[root]);
    for (int64_t i = 1; i < tree.vertices; ++i) {
      const int64_t v = tree.order[i];
      const scalar_t* a = decay[v];
      const scalar_t* from = y[v];
      const scalar_t* own = select<scalar_t>(has_sum[v], below[v], x[v]);
      const scalar_t* above = z[tree.parent[v]];
      scalar_t* to = z[v];
      scalar_t* decay_to = grad_decay[v];
#pragma GCC ivdep
      for (int64_t c = 0; c < width; ++c) {
        decay_to[c] = own[c] * above[c];
        to[c] = from[c] + a[c] * above[c];
      }
    }
    std::fill(grad_decay[root], grad_decay[root] + width, scalar_t(0));
  }

  // h is scratch.
  template <typename scalar_t>
  static void scan_backward(
      const Tree& tree,
      int64_t width,
      Propagation propagation,
      const Rows<const scalar_t>& grad_h,
      const Rows<const scalar_t>& decay,
      const Rows<const scalar_t>& x,
      const Rows<scalar_t>& grad_x,
      const Rows<scalar_t>& grad_decay,
      const Rows<scalar_t>& h,
      uint8_t* has_sum) {
    switch (propagation) {
      case Propagation::kAll:
        up_both(tree, width, decay, x, grad_decay, grad_h, grad_x, has_sum);
        return down_all_backward(tree, width, grad_h, decay, x, grad_x, grad_decay, h, has_sum);
      case Propagation::kUp:
        up(tree, width, decay, x, grad_decay, has_sum);
        return down_one_backward<scalar_t>(tree, width, decay, x, grad_decay, grad_h, grad_x, grad_decay, has_sum);
      case Propagation::kDown:
        up(tree, width, decay, grad_h, grad_x, has_sum);
        down_one_backward<scalar_t>(tree, width, decay, grad_h, grad_x, x, h, grad_decay, has_sum);
        return copy_leaves(tree, width, grad_h, grad_x, has_sum);
    }
  }

  // ---- for a backward pass that needs h on its way: less memory, and no sum is made twice ----

  // h, and in place of x what the passes backwards need of it: the sums u after a pass up, else x itself.
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
      up<scalar_t>(tree, width, decay, x, x, flags);
    }
    std::fill(flags, flags + tree.vertices, uint8_t(0));
    switch (propagation) {
      case Propagation::kAll:
        return down<true, scalar_t>(tree, width, decay, x, h, flags);
      case Propagation::kUp:
        return copy_leaves<scalar_t>(tree, width, x, h, flags);
      case Propagation::kDown:
        return down<false, scalar_t>(tree, width, decay, x, h, flags);
    }
  }

  // From what scan_keeping_sums has left: the gradient of x in place of that of h, and that of the decay in place of
  // the sums.
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
        up<scalar_t>(tree, width, decay, grad, grad, flags);
        return down_all_backward_from_sums<scalar_t>(tree, width, decay, sums, h, grad);
      case Propagation::kUp:
        down<false, scalar_t>(tree, width, decay, grad, grad, flags);
        return multiply_by_parent<scalar_t>(tree, width, sums, grad, sums);
      case Propagation::kDown:
        up<scalar_t>(tree, width, decay, grad, grad, flags);
        return multiply_by_parent<scalar_t>(tree, width, grad, h, sums);
    }
  }

  // As down_all_backward, where `sums` holds u and then the gradient of the decay, and `grad` holds e and then g.
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
        prefetch<scalar_t>(decay, tree.order[i + kAhead], width);
        prefetch<scalar_t>(sums, tree.order[i + kAhead], width);
        prefetch<scalar_t>(grad, tree.order[i + kAhead], width);
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
