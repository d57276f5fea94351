// AVX-512 tier.
#include "cpu/sequence/avx512.h"

#include "cpu/sequence/body.h"

namespace moestream {
const SequenceKernels kSequenceAvx512 = kTable;
}
