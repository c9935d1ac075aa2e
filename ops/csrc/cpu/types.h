// Data structures of the kernels, shared by all instruction sets.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "cpu/compaction.h"
#include "dtypes.h"

namespace grootvl::cpu {

// An uninitialized array.
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

// Memory to build trees in, one image after another.
struct TreeWorkspace {
  // Images whose trees are walked in an interleaved loop; each has a slot in links and stack.
  static constexpr int64_t kTogether = 2;

  TreeWorkspace(int64_t height, int64_t width)
      : height(height),
        width(width),
        vertical((height + 1) * width, kNoEdge),
        horizontal(height * width + 1, kNoEdge),
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
  // Edge weights as ordered integers. vertical[v] is the edge above vertex v, horizontal[v] the one to its left.
  // Missing edges and the padding after the last vertex are kNoEdge.
  std::vector<uint32_t> vertical, horizontal;
  // The tree edges of each vertex as four bits; `chosen` has a row of padding above and below the grid.
  std::vector<uint8_t> chosen, links;
  // The component of each vertex, with a row of padding above and below the grid.
  std::vector<int32_t> labels;
  Uninitialised<int32_t> leader, joined, next, id;
  Uninitialised<uint32_t> stack;
  Uninitialised<uint64_t> least;
  // The list of edges between different components. ends packs both components, keys the weight and the edge index. Up
  // to 8 words after the list may be overwritten.
  Uninitialised<uint64_t> ends, keys;
};

// The rooted tree of one image.
struct Tree {
  const int32_t* parent;
  const int32_t* order;
  int64_t vertices;
};

// A range of channels of one image: a row for each vertex.
template <typename scalar_t>
struct Rows {
  scalar_t* first;
  int64_t stride;

  scalar_t* operator[](int64_t v) const {
    return first + v * stride;
  }

  // The rows without the channels before `channel`.
  Rows from(int64_t channel) const {
    return {first + channel, stride};
  }

  operator Rows<const scalar_t>() const {
    return {first, stride};
  }
};

// Intermediate results of a scan's backward pass for one image: the subtree sums of x and of grad_h, and h.
template <typename acc_t>
struct ScanSums {
  Rows<acc_t> x, grad, h;
};

// Mean and 1 / standard deviation of a row.
template <typename scalar_t>
struct Moments {
  scalar_t mean, scale;
};

// Three consecutive rows of an image for a 3x3 convolution; positions outside the image read zeros.
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

// The inputs of a selective scan for one image; see selective_scan.h. rate is -exp(A_log), skip is Ds; dt_weight is
// transposed to (rank, channels).
template <typename stored_t>
struct Selective {
  using acc_t = Accumulated<stored_t>;

  int64_t channels, rank;
  acc_t eps;
  Rows<const stored_t> x, dt, b, c, gate;
  const acc_t *dt_weight, *dt_bias, *rate, *skip;
  const acc_t *h_norm_weight, *h_norm_bias, *out_norm_weight, *out_norm_bias;
};

// The gradients of these inputs: of the activations for one image, of the parameters as partial sums over some of its
// vertices. x_by_skip is the gradient of x through the skip connection alone; its rows may alias those of x.
template <typename stored_t>
struct SelectiveGradients {
  using acc_t = Accumulated<stored_t>;

  Rows<stored_t> x, dt, b, c, gate;
  Rows<acc_t> x_by_skip;
  acc_t *dt_weight, *dt_bias, *rate, *skip;
  acc_t *h_norm_weight, *h_norm_bias, *out_norm_weight, *out_norm_bias;
};

}  // namespace grootvl::cpu
