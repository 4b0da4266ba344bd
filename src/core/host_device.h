// HGRN_HD before a function: host and device have it, where a compiler of device code reads it.
#pragma once

#ifdef __CUDACC__
#define HGRN_HD __host__ __device__
#else
#define HGRN_HD
#endif
