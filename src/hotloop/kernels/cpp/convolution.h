// Convolutions with 3x3 filters and stride 1, forward and backward, in float32.
#pragma once

#include "abi.h"

namespace hotloop {

void convolve3x3(const ConvolutionCall& call);
void convolve3x3_input_gradient(const ConvolutionInputGradientCall& call);
void convolve3x3_filter_gradient(const ConvolutionFilterGradientCall& call);

}  // namespace hotloop
