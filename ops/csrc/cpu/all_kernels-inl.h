// All kernels of one instruction set; included inside its namespace.
#include "cpu/elementary-inl.h"
//
#include "cpu/layer_norm_kernels-inl.h"
//
#include "cpu/depthwise_conv_kernels-inl.h"
#include "cpu/scan_kernels-inl.h"
#include "cpu/selective_scan_kernels-inl.h"
#include "cpu/tree_kernels-inl.h"

struct Kernels : TreeKernels, ScanKernels, SelectiveScanKernels, DepthwiseConvKernels {};
