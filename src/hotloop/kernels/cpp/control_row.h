// The table of an optimizer's scalars of a step.
#pragma once

#include "abi.h"

namespace hotloop {

inline UpdateRule rule_of(const ControlRow& row) {
  UpdateRule rule{};
  rule.kind = static_cast<int32_t>(row.kind);
  rule.first_step = row.first_step != 0;
  rule.lr = row.lr;
  rule.beta1 = row.beta1;
  rule.beta2 = row.beta2;
  rule.eps = row.eps;
  rule.weight_decay = row.weight_decay;
  rule.bias_correction1 = row.bias_correction1;
  rule.bias_correction2_sqrt = row.bias_correction2_sqrt;
  rule.momentum = row.momentum;
  rule.dampening = row.dampening;
  rule.alpha = row.alpha;
  rule.gradient_rate = row.gradient_rate;
  rule.moment_rate = row.moment_rate;
  return rule;
}

}  // namespace hotloop
