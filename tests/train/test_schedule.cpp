// Learning-rate schedules at the points that their definitions fix.
#include "train/schedule.h"

#include <cmath>

#include "catch.h"

using namespace hgrn;

namespace {
OptimConfig config(ScheduleKind kind) {
  OptimConfig c;
  c.lr = 2e-3;
  c.warmup_steps = 10;
  c.warmup_init_lr = 1e-4;
  c.min_lr_ratio = 0.1;
  c.schedule = kind;
  return c;
}
}  // namespace

TEST_CASE("schedule: warm-up is linear and reaches lr at its last step", "[train]") {
  for (ScheduleKind k : {ScheduleKind::cosine, ScheduleKind::linear, ScheduleKind::wsd,
                         ScheduleKind::inverse_sqrt, ScheduleKind::constant}) {
    const OptimConfig c = config(k);
    CHECK(learning_rate(c, 110, 1) == Approx(1e-4 + 1.9e-3 * 0.1));
    CHECK(learning_rate(c, 110, 5) == Approx(1e-4 + 1.9e-3 * 0.5));
    CHECK(learning_rate(c, 110, 10) == Approx(2e-3));
  }
}

TEST_CASE("schedule: after warm-up", "[train]") {
  const int64_t S = 110;
  CHECK(learning_rate(config(ScheduleKind::cosine), S, 60) == Approx(2e-3 * 0.55));
  CHECK(learning_rate(config(ScheduleKind::cosine), S, 110) == Approx(2e-4));
  CHECK(learning_rate(config(ScheduleKind::linear), S, 60) == Approx(2e-3 * 0.55));
  CHECK(learning_rate(config(ScheduleKind::linear), S, 110) == Approx(2e-4));
  CHECK(learning_rate(config(ScheduleKind::inverse_sqrt), S, 40) == Approx(1e-3));
  CHECK(learning_rate(config(ScheduleKind::constant), S, 100) == Approx(2e-3));
  CHECK(learning_rate(config(ScheduleKind::wsd), S, 90) == Approx(2e-3));
  CHECK(learning_rate(config(ScheduleKind::wsd), S, 100) == Approx(2e-3 * 0.55));
  CHECK(learning_rate(config(ScheduleKind::wsd), S, 110) == Approx(2e-4));
}

TEST_CASE("schedule: no warm-up, and warm-up longer than the run", "[train]") {
  OptimConfig c = config(ScheduleKind::cosine);
  c.warmup_steps = 0;
  CHECK(learning_rate(c, 100, 50) == Approx(2e-3 * 0.55));
  c.schedule = ScheduleKind::inverse_sqrt;
  CHECK(learning_rate(c, 100, 4) == Approx(1e-3));
  c.warmup_steps = 1000;
  for (int64_t s : {1, 50, 100}) CHECK(std::isfinite(learning_rate(c, 100, s)));
}

TEST_CASE("schedule: the WikiText-103 run of the paper", "[train]") {
  OptimConfig c;
  c.lr = 5e-4;
  c.warmup_steps = 4000;
  c.warmup_init_lr = 1e-7;
  c.schedule = ScheduleKind::inverse_sqrt;
  CHECK(learning_rate(c, 50000, 4000) == Approx(5e-4));
  CHECK(learning_rate(c, 50000, 16000) == Approx(2.5e-4));
}
