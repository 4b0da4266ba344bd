// Learning-rate schedules. Update s = 1, 2, ...; W = warmup_steps, S = train.steps, m =
// min_lr_ratio. For s <= W: init + (lr - init) s/W. Then, with p = (s-W)/(S-W):
//   cosine        lr (m + (1-m)(1 + cos(pi p))/2)
//   linear        lr (1 - (1-m) p)
//   inverse_sqrt  lr sqrt(W/s)   (W = 0 counts as 1)
//   constant      lr
//   wsd           lr until p = 0.8, then linearly to m lr at p = 1
#pragma once
#include "model/config.h"

namespace hgrn {

double learning_rate(const OptimConfig& c, int64_t steps, int64_t s);

}  // namespace hgrn
