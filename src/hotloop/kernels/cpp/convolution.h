// Convolutions with small filters and stride 1, forward and backward, in float32.
#pragma once

#include "abi.h"

namespace hotloop {

void convolve(const ConvolutionCall& call);
void convolve_input_gradient(const ConvolutionInputGradientCall& call);
void convolve_filter_gradient(const ConvolutionFilterGradientCall& call);

}  // namespace hotloop
