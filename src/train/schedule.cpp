#include "train/schedule.h"

#include <algorithm>
#include <cmath>

namespace hgrn {

double learning_rate(const OptimConfig& c, int64_t steps, int64_t s) {
  const double W = double(c.warmup_steps), S = double(steps), m = c.min_lr_ratio;
  if (s <= c.warmup_steps) return c.warmup_init_lr + (c.lr - c.warmup_init_lr) * double(s) / W;
  const double p = S > W ? std::min(1.0, (double(s) - W) / (S - W)) : 1.0;
  switch (c.schedule) {
    case ScheduleKind::cosine: return c.lr * (m + (1 - m) * (1 + std::cos(M_PI * p)) / 2);
    case ScheduleKind::linear: return c.lr * (1 - (1 - m) * p);
    case ScheduleKind::inverse_sqrt: return c.lr * std::sqrt(std::max(W, 1.0) / double(s));
    case ScheduleKind::constant: return c.lr;
    case ScheduleKind::wsd: return p <= 0.8 ? c.lr : c.lr * (1 - (1 - m) * (p - 0.8) / 0.2);
  }
  return c.lr;
}

}  // namespace hgrn
