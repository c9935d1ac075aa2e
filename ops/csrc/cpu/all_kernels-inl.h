// All kernels of one instruction set, in the order of their dependencies. Included inside its namespace.
// clang-format off
#include "cpu/elementary-inl.h"
#include "cpu/vectors-inl.h"
#include "cpu/layer_norm_kernels-inl.h"
#include "cpu/depthwise_conv_kernels-inl.h"
#include "cpu/scan_kernels-inl.h"
#include "cpu/step_projection_kernels-inl.h"
#include "cpu/selective_scan_kernels-inl.h"
#include "cpu/tree_kernels-inl.h"
// clang-format on

struct Kernels : TreeKernels, ScanKernels, SelectiveScanKernels, DepthwiseConvKernels {};
