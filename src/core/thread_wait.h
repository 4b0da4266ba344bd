// How long threads spin for each other before they sleep.
#pragma once
namespace hgrn {

// libgomp lets a thread that waits spin 300,000 rounds, some 15 ms on recent CPUs. Where other
// programs want the same cores, that time is taken from the very thread that is waited for:
// docs/benchmarks.md has what it costs. 10,000 rounds, half a millisecond, are enough to bridge
// what lies between two parallel regions. libgomp reads the number before main(), so the program
// starts itself once more with it; the process stays the same. Does nothing where GOMP_SPINCOUNT or
// OMP_WAIT_POLICY is set, or without OpenMP. First thing in main().
void spin_briefly(char** argv);

}  // namespace hgrn
