#include "bind/bind.h"

namespace moestream {

void bind_sequence(nanobind::module_&) {}

}  // namespace moestream
