// What the kernels of all instruction sets work on.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/dtypes.h"

namespace grootvl::cpu {

// Memory that starts with whatever it holds.
template <typename T>
class Uninitialised {
 public:
  explicit Uninitialised(int64_t size) : memory_(new T[size]) {}

  T* data() const {
    return memory_.get();
  }

 private:
  std::unique_ptr<T[]> memory_;
};

// Memory for the tree of one image after another.
struct TreeWorkspace {
  // Images whose trees are walked together; each has a slot in links and stack.
  static constexpr int64_t kTogether = 2;

  TreeWorkspace(int64_t height, int64_t width)
      : height(height),
        width(width),
        vertical((height + 1) * width, 0xffffffff),
        horizontal(height * width + 1, 0xffffffff),
        chosen((height + 2) * width),
        links(kTogether * height * width),
        labels((height + 2) * width),
        leader(height * width),
        joined(height * width),
        next(height * width),
        id(height * width),
        stack(kTogether * (height * width + 4)),
        least(height * width),
        ends(2 * height * width + 8),
        keys(2 * height * width + 8) {}

  int64_t height, width;
  // Edge weights as integers. vertical[v] is the edge above vertex v, horizontal[v] the one to its left; where there is
  // none, and behind the last vertex, they are larger than any weight.
  std::vector<uint32_t> vertical, horizontal;
  // The four edges of a vertex as bits; `chosen` has a row above and below the grid.
  std::vector<uint8_t> chosen, links;
  // The component of each vertex, with a row above and below the grid.
  std::vector<int32_t> labels;
  Uninitialised<int32_t> leader, joined, next, id;
  Uninitialised<uint32_t> stack;
  Uninitialised<uint64_t> least;
  // The edges between different components: both components in one word; the weight as an integer above the index. Some
  // words behind the list may be overwritten.
  Uninitialised<uint64_t> ends, keys;
};

// The rooted tree of one image.
struct Tree {
  const int32_t* parent;
  const int32_t* order;
  int64_t vertices;
};

// Some channels of one image: a row for each vertex.
template <typename scalar_t>
struct Rows {
  scalar_t* first;
  int64_t stride;

  scalar_t* operator[](int64_t v) const {
    return first + v * stride;
  }

  // From a channel on.
  Rows from(int64_t channel) const {
    return {first + channel, stride};
  }

  operator Rows<const scalar_t>() const {
    return {first, stride};
  }
};

// What the backward pass of a scan keeps of one image: the sums of x and of the gradient of h, and h.
template <typename acc_t>
struct ScanSums {
  Rows<acc_t> x, grad, h;
};

// Mean and 1 / standard deviation of a row.
template <typename scalar_t>
struct Moments {
  scalar_t mean, scale;
};

// Three rows of a map: a row outside of the image, and a column outside of it, is one position of zeros.
template <typename scalar_t>
struct ConvolutionRows {
  const scalar_t* row[3];
  const scalar_t* zeros;
  int64_t stride, width, channels;

  const scalar_t* position(int tap_row, int64_t column) const {
    const bool inside = 0 <= column && column < width && row[tap_row] != nullptr;
    return inside ? row[tap_row] + column * stride : zeros;
  }
};

// The inputs of a selective scan for one image; see selective_scan.h. rate is -exp(A_log), skip is Ds, dt_weight is
// transposed: (rank, channels).
template <typename stored_t>
struct Selective {
  using acc_t = Accumulated<stored_t>;

  int64_t channels, rank;
  acc_t eps;
  Rows<const stored_t> x, dt, b, c, gate;
  const acc_t *dt_weight, *dt_bias, *rate, *skip;
  const acc_t *h_norm_weight, *h_norm_bias, *out_norm_weight, *out_norm_bias;
};

// Gradients of the same: of the inputs for one image, of the parameters for some of its vertices, to be added up. What
// x gets through the skip connection comes before the rest, in rows that may be those of x.
template <typename stored_t>
struct SelectiveGradients {
  using acc_t = Accumulated<stored_t>;

  Rows<stored_t> x, dt, b, c, gate;
  Rows<acc_t> x_by_skip;
  acc_t *dt_weight, *dt_bias, *rate, *skip;
  acc_t *h_norm_weight, *h_norm_bias, *out_norm_weight, *out_norm_bias;
};

}  // namespace grootvl::cpu
